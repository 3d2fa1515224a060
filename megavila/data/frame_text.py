"""The text around the tokens of one frame."""

from __future__ import annotations

from megavila.runtime.errors import MegavilaError

_SLOT = "{media}"


class _Seconds(float):
    """A time that reads as whole seconds, halves up, unless a format is given: 7.5 is "8", or "7.50" as `:.2f`."""

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else str(int(self + 0.5))


class FrameText:
    """`data.frame_template`: text with `{media}` once and `{time}` (or `{time:.1f}`) as often as wanted."""

    def __init__(self, template: str) -> None:
        if template.count(_SLOT) != 1:
            raise MegavilaError(f"data.frame_template={template!r} must hold {_SLOT} exactly once")
        self._before, self._after = template.split(_SLOT)
        try:
            self.around(0.0)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise MegavilaError(
                f"data.frame_template={template!r}: only {_SLOT} and {{time}} can stand in braces ({error!r})"
            ) from error

    def around(self, time: float) -> tuple[str, str]:
        """Texts before and after the tokens of a frame shown at `time` seconds."""
        seconds = _Seconds(time)
        return self._before.format(time=seconds), self._after.format(time=seconds)
