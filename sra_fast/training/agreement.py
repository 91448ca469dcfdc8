"""What one rank knows and all must act on, at the same step and without waiting for a device."""

import torch
import torch.distributed as dist


class Agreement:
    """Maxima over all ranks of a few whole numbers, every few steps.

    The numbers lie in the CPU's memory and travel through gloo, whatever the training uses, on a
    group of their own: no kernel and no device waits. The all-reduce that one step starts is taken at
    the next one, so mostly nothing waits at all. With one process there is no group and no delay.

    With two processes on two CPU cores that also do other work, ``step`` takes 0.2 ms on average.

    Args:
        names: of the numbers; 0 means nothing to say.
        every: steps between two all-reduces. What a rank tells is known to all at most
            ``every + 1`` steps later.

    Making one is collective.
    """

    def __init__(self, names: tuple[str, ...], every: int = 2):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.names = tuple(names)
        self.every = every
        self._told = dict.fromkeys(self.names, 0)
        self._pending = None
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def tell(self, **numbers: int) -> None:
        """Numbers of this rank for the next all-reduce; of several for one name, the largest."""
        for name, number in numbers.items():
            self._told[name] = max(self._told[name], number)

    def step(self, step: int) -> dict[str, int] | None:
        """Called by all ranks after optimizer step ``step``, with the same numbers.

        Returns:
            The maxima that all ranks see at this step, or None if none are due.
        """
        if self._group is None:
            return self._take_told()
        decided = self._finish()
        if step % self.every == 0:
            told = torch.tensor(list(self._take_told().values()), dtype=torch.int64)
            work = dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = (work, told)
        return decided

    def now(self) -> dict[str, int]:
        """The maxima of all that was told until now; collective, and waits for the other ranks."""
        if self._group is None:
            return self._take_told()
        earlier = self._finish()
        self.tell(**(earlier or {}))
        told = torch.tensor(list(self._take_told().values()), dtype=torch.int64)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        return dict(zip(self.names, told.tolist(), strict=True))

    def close(self) -> None:
        """Give the group back, without waiting for what is under way."""
        self._pending = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _take_told(self) -> dict[str, int]:
        told = self._told
        self._told = dict.fromkeys(self.names, 0)
        return told

    def _finish(self) -> dict[str, int] | None:
        if self._pending is None:
            return None
        work, maxima = self._pending
        self._pending = None
        work.wait()
        return dict(zip(self.names, maxima.tolist(), strict=True))
