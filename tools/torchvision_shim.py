"""Declare torchvision's operators where its binary extension cannot be loaded.

A CUDA build of torchvision beside a CPU-only torch fails to import with "operator torchvision::nms
does not exist". `make_env.py` copies this module into site-packages, with a `.pth` line that
imports it at start-up, only where that happens. It costs nothing until torchvision is imported:
torch itself is not touched before.
"""

import importlib.machinery
import sys

_OPERATORS = ("nms", "qnms")
_libraries = []


def _declare_operators():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


class _TorchvisionFinder:
    """Finds torchvision as usual, and declares its operators when its code is about to run."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module):
            _declare_operators()
            run_module(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _TorchvisionFinder)
