"""What is wrong with a file, as a part of an error's one line."""


def why(error: Exception) -> str:
    """What a library says of a file that it cannot read, in one line, without Python's names."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        # its text is the key alone
        return f"{text} is missing"
    return text or type(error).__name__
