"""State for checkpoints, common to all rules."""

from enum import Enum

from attrs import define, evolve, fields

from fitwatch.helpers.aliases import StateDict


@define
class Stateful:
    """Base of attrs classes whose ``init=False`` fields are state; the other fields are options."""

    def state_dict(self) -> StateDict:
        """Return everything seen so far as numbers, strings, tensors, and lists and dicts of them; no options."""
        return {key: _plain(getattr(self, name)) for key, name in self._state_fields().items()}

    def load_state_dict(self, state: StateDict) -> None:
        """Continue from a `state_dict` as if never interrupted, given the same options.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        names = self._state_fields()
        if wrong := sorted(state.keys() ^ names.keys()):
            raise ValueError(f"not a state of {type(self).__name__}: keys missing or unknown: {wrong}")
        for key, name in names.items():
            part = getattr(self, name)
            if isinstance(part, Stateful):
                part.load_state_dict(state[key])
            else:
                setattr(self, name, _plain(state[key]))

    def reset(self) -> None:
        """Forget everything seen so far; keep the options."""
        self.load_state_dict(evolve(self).state_dict())

    def _state_fields(self) -> dict[str, str]:
        """Key in the state -> name of the field."""
        return {a.name.lstrip("_"): a.name for a in fields(type(self)) if not a.init}


def _plain(value: object) -> object:
    """Copy lists and dicts, and turn enum members and stateful parts into plain values."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Stateful):
        return value.state_dict()
    return value.value if isinstance(value, Enum) else value
