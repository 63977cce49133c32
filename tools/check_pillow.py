"""Fail if pillow lies over pillow-simd: both own the folder `PIL`, and the later one wins silently."""

from __future__ import annotations

import sys
from importlib import metadata


def main() -> int:
    installed = {dist.metadata["Name"].lower().replace("_", "-") for dist in metadata.distributions()}
    if "pillow" in installed:
        print(
            "pillow is installed beside pillow-simd and shadows it. Remove what needs pillow, then run:\n"
            "    make clean-venv demo",
            file=sys.stderr,
        )
        return 1
    if "pillow-simd" not in installed:
        print("pillow-simd is not installed; run make again", file=sys.stderr)
        return 1
    import PIL
    from PIL import features

    if ".post" not in PIL.__version__ or not features.check_feature("libjpeg_turbo"):
        print(
            f"PIL is {PIL.__version__}, which is not Pillow-SIMD built with libjpeg-turbo; "
            "run `make clean-venv`, then make again",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
