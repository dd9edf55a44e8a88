"""The imagined transitions: a ring that can grow in place."""

import numpy as np
import torch as th

from sb3_mbpo.type_aliases import Transitions


class ImaginedBuffer:
    """
    A ring of imagined transitions: the newest ``capacity`` rows, one contiguous float32 row each.

    The memory is reserved for the largest capacity that is to come, so that growing needs no second copy; on a CPU, the
    operating system hands it out as rows arrive. The free slots always lie at ``_pos``, between the newest and the oldest row.

    :param capacity: rows
    :param obs_dim: of the flattened observation
    :param action_dim: of the flattened action
    :param device: where the rows lie
    :param reserved: rows that it will grow to
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: th.device, reserved: int = 0) -> None:
        self.capacity = capacity
        self._reserved = reserved
        self._widths = [obs_dim, action_dim, obs_dim, 1, 1]
        self._rows = th.empty(0, sum(self._widths), device=device)  # the ring is made when rows arrive
        self._pos = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, transitions: Transitions) -> None:
        """
        Stores rows; the oldest give way.

        :param transitions: raw, on the same device
        """
        self._allocate()
        newest = transitions.rows(slice(-self.capacity, None))
        columns = [field if field.dim() == 2 else field.float().unsqueeze(-1) for field in newest]
        rows = th.cat(columns, dim=-1)
        n_before_end = min(len(rows), self.capacity - self._pos)
        self._rows[self._pos : self._pos + n_before_end] = rows[:n_before_end]
        self._rows[: len(rows) - n_before_end] = rows[n_before_end:]
        self._pos = (self._pos + len(rows)) % self.capacity
        self._size = min(self._size + len(rows), self.capacity)

    def clear(self) -> None:
        """Forgets all rows; their memory stays reserved."""
        self._pos = self._size = 0

    def newest(self, n_rows: int) -> Transitions:
        """The last ``n_rows`` that were added (all, if there are fewer), oldest first."""
        return self._unpack(self._newest(n_rows))

    def ring(self) -> tuple[np.ndarray, int]:
        """The filled slots in their order, (rows, columns), and the slot of the next row: for :meth:`set_ring`."""
        head, tail = self._rows[: self._pos], self._rows[self._oldest() : self.capacity]
        has_gap = self._pos < self._size < self.capacity
        return (th.cat((head, tail)) if has_gap else self._rows[: self._size]).cpu().numpy(), self._pos

    def set_ring(self, capacity: int, rows: np.ndarray, pos: int) -> None:
        """
        :param capacity: rows from now on
        :param rows: (rows, columns), at most ``capacity``
        :param pos: slot of the next row
        """
        self.capacity, self._size, self._pos = capacity, len(rows), pos
        self._rows = self._rows.new_empty(0, self._rows.shape[1])
        if len(rows):
            self._allocate()
            self._rows[:pos] = th.as_tensor(rows[:pos])
            self._rows[self._oldest() : capacity] = th.as_tensor(rows[pos:])

    def resize(self, capacity: int) -> None:
        """
        Keeps the newest rows.

        :param capacity: rows from now on
        """
        wider = capacity - self.capacity
        if wider < 0 or capacity > len(self._rows):
            kept = self._newest(capacity)
            self.capacity, self._size, self._pos = capacity, len(kept), len(kept) % capacity
            self._rows = kept.new_empty(0, kept.shape[1])
            if len(kept):
                self._allocate()
                self._rows[: len(kept)] = kept
        elif wider > 0:
            # the oldest rows move to the new end, the last of them first, so that none is overwritten
            oldest, end = self._oldest(), self.capacity
            while end > oldest:
                begin = max(oldest, end - wider)
                self._rows[begin + wider : end + wider] = self._rows[begin:end]
                end = begin
            self.capacity = capacity

    def sample(self, n_rows: int, generator: th.Generator) -> Transitions:
        """
        Uniform, with replacement.

        :param n_rows: how many
        :param generator: draws the rows
        """
        slots = th.randint(self._size, (n_rows,), generator=generator, device=self._rows.device)
        if self._size < self.capacity:  # those beyond the free slots
            slots += (slots >= self._pos) * (self.capacity - self._size)
        return self._unpack(self._rows[slots])

    def _allocate(self) -> None:
        if len(self._rows) < self.capacity:
            self._rows = self._rows.new_empty(max(self.capacity, self._reserved), self._rows.shape[1])

    def _oldest(self) -> int:
        """The slot after the free ones: from there on the ring is filled to its end."""
        return self._pos + self.capacity - self._size

    def _newest(self, n_rows: int) -> th.Tensor:
        ages = th.arange(min(n_rows, self._size), 0, -1, device=self._rows.device)
        return self._rows[(self._pos - ages) % self.capacity]

    def _unpack(self, rows: th.Tensor) -> Transitions:
        observations, actions, next_observations, rewards, terminated = rows.split(self._widths, dim=-1)
        return Transitions(observations, actions, next_observations, rewards.squeeze(-1), terminated.squeeze(-1) > 0.5)
