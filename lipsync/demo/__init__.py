"""A model package that ships with the project: a drawn presenter, who speaks what a synthesiser says.

No footage of a person is involved. `build_demo_package` draws the presenter, encodes the videos and lays the weights
beside them: a complete package, of the same shape as one made from a real video.
"""

from lipsync.demo.build import build_demo_package, demo_package_folder

__all__ = ["build_demo_package", "demo_package_folder"]
