"""Generate images with one or many processes."""
