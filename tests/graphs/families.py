"""Which family each file of ../shared/checkpoints must be recognised as, and how the catalogue is read."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import weightspace as ws
from weightspace.errors import CheckpointError
from weightspace.paths import data_dir

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
CHECKPOINTS = SHARED / "checkpoints"

# Pattern below ../shared/checkpoints -> family. ONNX files and Keras files with a config need none.
EXPECTED = {
    "arena-transformers/*.pt": "transformer-lens",
    "backdoor-csaw/*.h5": "deepid",
    "backdoor-ibau/*.pth": "small-vgg",
    "backdoor-nad/*.tar": "wide-resnet",
    "backdoor-sra/*narrow_resnet.ckpt": "resnet-cifar",
    "backdoor-sra/*narrow_vgg.ckpt": "vgg",
    "backdoor-trojai/*.pt": "minigrid-actor-critic",
    "burn-mnist/*": "burn-mnist",
    "crepe/*.pth": "crepe",
    "face-detector/*.pth": "face-detector-rfb",
    "gan-vae/*lenet*.pth": "lenet5",
    "gan-vae/*.ckpt": "gan-mlp",
    "honk/*.pt": "honk-res",
    "inr-orbit/*.pth": "siren",
    "mnist-mlp/*.safetensors": "mnist-mlp",
    "mtcnn/*.pt": "mtcnn",
    "nino/*.pt": "nino-mlp",
    "npz/*.npz": "numpy-mlp",
    "otfusion-mnist/*.zip": "otfusion-mnist",
    "resnet-cifar/*.th": "resnet-cifar",
    "rl-agents/*.zip": "stable-baselines3",
    "silero/*.safetensors": "silero-vad",
    "textgenrnn/*.hdf5": "textgenrnn",
    "vnncomp/*.pth": "cifar-kw",
    "zoo-cnn/*.npy": "zoo-cnn",
}


def expected_files() -> list[tuple[Path, str]]:
    return [
        (path, family) for pattern, family in EXPECTED.items() for path in sorted(CHECKPOINTS.glob(pattern))
    ]


@functools.cache
def families() -> tuple[ModuleType, ...]:
    """The files of graphs/ in the order in which they are asked."""
    modules = []
    for path in sorted(data_dir("graphs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"weightspace_graphs_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    return tuple(sorted(modules, key=lambda module: getattr(module, "PRIORITY", 50)))


def signature(tensors: Any) -> ws.Signature:
    """The signature of a checkpoint or of a plain mapping of tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return ws.Signature(shapes, dtypes, getattr(tensors, "metadata", {}))


def is_exact(skeleton: ws.Skeleton, sig: ws.Signature) -> bool:
    """Whether the skeleton has the checkpoint's tensors, no more and no fewer."""
    own = {skeleton.rename.get(k, k): tuple(v.shape) for k, v in skeleton.module.state_dict().items()}
    return own == {name: shape for name, shape in sig.shapes.items() if name not in skeleton.unused}


def recognise(sig: ws.Signature) -> dict[str, ws.Skeleton]:
    """Every family that fits exactly, in the order in which they are asked."""
    found = {}
    for module in families():
        skeleton = module.build(sig)
        if skeleton is not None and is_exact(skeleton, sig):
            found[getattr(module, "FAMILY", module.__name__)] = skeleton
    return found


def run(skeleton: ws.Skeleton, tensors: Any, *inputs: Tensor) -> Any:
    """The network's outputs with a checkpoint's tensors, on its own example inputs by default."""
    state = {key: tensors[skeleton.rename.get(key, key)] for key in skeleton.module.state_dict()}
    with torch.no_grad():
        return torch.func.functional_call(skeleton.module, state, inputs or skeleton.inputs)


def checkpoints(path: Path) -> list[ws.Checkpoint]:
    """The models of a file, most often one."""
    try:
        return [ws.open(path)]
    except CheckpointError as error:
        members = getattr(error, "members", ())
        if not members:
            raise
        return [ws.open(path, member=member) for member in members]


def program(skeleton: ws.Skeleton, tensors: Any, family: str) -> ws.Program:
    """The network as a function of the checkpoint's own tensors."""
    names = {skeleton.rename.get(key, key): key for key in skeleton.module.state_dict()}

    def function(given: Mapping[str, Tensor], *inputs: Any) -> Any:
        state = {key: given[name] for name, key in names.items()}
        return torch.func.functional_call(skeleton.module, state, inputs)

    own = {name: tensors[name] for name in names}
    return ws.Program(own, function, skeleton.inputs, {}, f"catalogue:{family}")


def load(path: Path) -> tuple[ws.Skeleton, dict[str, Tensor]]:
    """The first fitting skeleton and the tensors of a file's first model."""
    checkpoint = checkpoints(path)[0]
    skeleton = next(iter(recognise(signature(checkpoint)).values()))
    return skeleton, dict(checkpoint.items())
