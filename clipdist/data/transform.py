"""What a model does to a decoded image before it normalises the pixels; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class EvalTransform:
    """The evaluation transform of a model, which data/decode.py applies; names as in open_clip's PreprocessCfg.

    Attributes:
        size: side of the square that the model takes, pixels.
        resize_mode: "shortest": the shorter side is resized to `resize_size`, and the centre is cropped; "longest": the
            longer side is, and the rest is filled; "squash": both sides are, whatever the aspect ratio.
        interpolation: "bicubic" or "bilinear", both antialiased.
        fill_color: red, green and blue (0 to 255) of what "longest" fills.
        resize_size: pixels; 0: `size`.
        floor_crop: round the crop's offset down, as transformers does; False: to the nearest even number, as
            torchvision and open_clip do.
    """

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: tuple[int, int, int] = (0, 0, 0)
    resize_size: int = 0
    floor_crop: bool = False

    def __str__(self) -> str:
        side, target = f"{self.size} x {self.size}", self.resize_size or self.size
        how = {
            "shortest": f"shorter side resized to {target}, centre of {side} cropped",
            "longest": f"longer side resized to {target}, filled to {side} with {self.fill_color}",
            "squash": f"squashed to {target} x {target}" + f", centre of {side} cropped" * (target > self.size),
        }
        return f"{how[self.resize_mode]}, {self.interpolation}"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image after resizing; "longest" rounds, "shortest" cuts, as open_clip."""
        target = self.resize_size or self.size
        if self.resize_mode == "squash":
            return target, target
        if self.resize_mode == "longest":
            ratio = max(height, width) / target
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        short = min(height, width)
        return int(target * height / short), int(target * width / short)

    def offset(self, side: int) -> int:
        """Return where the crop begins on a side of so many pixels after resizing; negative: so much is filled."""
        if side < self.size:
            return -((self.size - side) // 2)
        return (side - self.size) // 2 if self.floor_crop else round((side - self.size) / 2)
