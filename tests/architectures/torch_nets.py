"""Perceptrons, convolutional nets, recurrent nets and neural fields, each in its own few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import Built, Factor, axes, case, inside, times


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution with batch norm, same padding."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


def conv_bn_relu(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(*conv_bn(cin, cout, kernel, stride, groups), nn.ReLU())


def pooled_head(width: int, classes: int = 10) -> nn.Sequential:
    """Global average pooling and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def image(size: int, channels: int = 3) -> Tensor:
    """A batch of two noise images."""
    return torch.randn(2, channels, size, size)


# Perceptrons --------------------------------------------------------------------------------------


@case("mlp", axes(32, 24))
def mlp() -> Built:
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 5))
    return net, (torch.randn(2, 12),), {}


@case("mlp-batchnorm", axes(32, 24))
def mlp_batchnorm() -> Built:
    net = nn.Sequential(
        nn.Linear(12, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 24),
        nn.BatchNorm1d(24, affine=False),
        nn.ReLU(),
        nn.Linear(24, 5),
    )
    return net, (torch.randn(2, 12),), {}


class GatedMLP(nn.Module):
    """Residual blocks of a gated linear unit whose halves come out of one matrix."""

    def __init__(self, width: int = 16, hidden: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(10, width)
        self.up = nn.ModuleList(nn.Linear(width, 2 * hidden) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            if index % 2:
                hidden = F.glu(up(x), dim=-1)
            else:
                value, gate = up(x).chunk(2, dim=-1)
                hidden = value * torch.sigmoid(gate)
            x = x + down(hidden)
        return self.head(x)


# A hidden unit is a row of the value half and the same row of the gate half, which move together.
@case("gated-mlp", axes(16, 32, 32))
def gated_mlp() -> Built:
    return GatedMLP(), (torch.randn(2, 10),), {}


class BagOfWords(nn.Module):
    """Summed word vectors, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16, mode="mean")
        self.hidden = nn.Linear(16, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.bag(words))))


@case("bag-of-words", axes(16, 24))
def bag_of_words() -> Built:
    return BagOfWords(), (torch.randint(0, 50, (2, 7)),), {}


class MeanOfWords(nn.Module):
    """Word vectors with padding, averaged over the words that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.head = nn.Linear(16, 4)

    def forward(self, words: Tensor) -> Tensor:
        mask = (words != 0).unsqueeze(-1).to(torch.float32)
        mean = (self.embedding(words) * mask).sum(1) / mask.sum(1).clamp_min(1)
        return self.head(mean)


@case("mean-of-words", axes(16))
def mean_of_words() -> Built:
    return MeanOfWords(), (torch.randint(0, 50, (2, 7)),), {}


class Siamese(nn.Module):
    """One encoder used twice; the output is a distance, so that the embedding itself may move."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.encoder(a) - self.encoder(b)).square().sum(-1).sqrt()


# The last bias cancels in the difference.
@case("siamese", axes(32, 16), unused=("encoder.2.bias",))
def siamese() -> Built:
    return Siamese(), (torch.randn(2, 12), torch.randn(2, 12)), {}


# Convolutional nets -------------------------------------------------------------------------------


# After flattening, a column of the linear layer is (channel, row, column); only the channel moves.
@case("cnn-flatten", axes(8, 12, 20))
def cnn_flatten() -> Built:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 3 * 3, 20),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(20, 10),
    )
    return net, (image(12, 1),), {}


VGG11 = (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M")


def vgg(width: int, hidden: int, size: int, classes: int, plan: Sequence[int | str] = VGG11) -> nn.Sequential:
    """VGG with batch norm and a three-layer classifier on the flattened map."""
    layers: list[nn.Module] = []
    channels = 3
    for step in plan:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2))
        else:
            conv = nn.Conv2d(channels, step * width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(step * width), nn.ReLU()]
            channels = step * width
    flat = channels * (size // 32) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout()]
    layers += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers)


@case("vgg11", axes(4, 8, 16, 16, 32, 32, 32, 32, 40, 40))
def vgg11() -> Built:
    return vgg(4, 40, 64, 10), (image(64),), {}


@case("vgg11-full", axes(64, 128, 256, 256, 512, 512, 512, 512, 4096, 4096), full=True)
def vgg11_full() -> Built:
    return vgg(64, 4096, 224, 1000), (image(224),), {}


class PadShortcut(nn.Module):
    """Shortcut without parameters: every second pixel, new channels zero on both sides (option A)."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int, option_a: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = PadShortcut((cout - cin) // 2) if option_a else conv_bn(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, (grouped) 3×3, 1×1 around a shortcut, optionally with squeeze-and-excite."""

    def __init__(self, cin: int, mid: int, cout: int, stride: int, groups: int = 1, squeeze: int = 0) -> None:
        super().__init__()
        self.a = conv_bn_relu(cin, mid, 1)
        self.b = conv_bn_relu(mid, mid, 3, stride, groups)
        self.se = SqueezeExcite(mid, squeeze) if squeeze else nn.Identity()
        self.c = conv_bn(mid, cout, 1)
        self.shortcut = nn.Identity() if stride == 1 and cin == cout else conv_bn(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(self.se(self.b(self.a(x)))) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Channels scaled by a small network of their means (Hu et al. 2018)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.expand = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(scale))))


def basic_stages(widths: Sequence[int], blocks: Sequence[int], stem: int, option_a: bool) -> nn.Sequential:
    stages: list[nn.Module] = []
    cin = stem
    for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            stages.append(BasicBlock(cin, width, 2 if block == 0 and index else 1, option_a))
            cin = width
    return nn.Sequential(*stages)


# Option A copies the 16 channels of the first stage into the middle of the 32 of the second: those 16
# are one factor through both stages. The 8 zero channels on either side are free by themselves. The
# third stage is 16 + (8 + 16 + 8) + 16. (The two paddings of a stage could even trade channels with one
# another; as the axis is a concatenation of contiguous segments, they count as two factors.)
# Each of the three blocks of a stage has an inner axis of its own.
@case("resnet20-option-a", axes(16, 8, 8, 16, 16) + times(3, axes(16, 32, 64)))
def resnet20_option_a() -> Built:
    stem = conv_bn_relu(3, 16)
    net = nn.Sequential(stem, basic_stages((16, 32, 64), (3, 3, 3), 16, option_a=True), pooled_head(64))
    return net, (image(16),), {}


def resnet18_theory(w: int) -> Counter[Factor]:
    # One residual stream a stage (the stem's is that of the first stage), one inner axis a block.
    return times(3, axes(w, 2 * w, 4 * w, 8 * w))


def resnet18(w: int, size: int, classes: int) -> Built:
    """ResNet-18 (He et al. 2016) of base width ``w``."""
    stem = nn.Sequential(conv_bn_relu(3, w, 7, 2), nn.MaxPool2d(3, 2, 1))
    stages = basic_stages((w, 2 * w, 4 * w, 8 * w), (2, 2, 2, 2), w, option_a=False)
    return nn.Sequential(stem, stages, pooled_head(8 * w, classes)), (image(size),), {}


case("resnet18", resnet18_theory(6))(lambda: resnet18(6, 32, 10))
case("resnet18-full", resnet18_theory(64), full=True)(lambda: resnet18(64, 64, 1000))


def resnet50_theory(w: int) -> Counter[Factor]:
    # The stem, then per stage one residual stream of 4w and two inner axes a block.
    stages = zip((w, 2 * w, 4 * w, 8 * w), (3, 4, 6, 3), strict=True)
    return sum((axes(4 * s) + times(2 * n, axes(s)) for s, n in stages), axes(w))


def resnet50(w: int, size: int, classes: int) -> Built:
    """ResNet-50 of base width ``w``."""
    layers: list[nn.Module] = [conv_bn_relu(3, w, 7, 2), nn.MaxPool2d(3, 2, 1)]
    cin = w
    for index, count in enumerate((3, 4, 6, 3)):
        mid = w << index
        for block in range(count):
            layers.append(Bottleneck(cin, mid, 4 * mid, 2 if block == 0 and index else 1))
            cin = 4 * mid
    return nn.Sequential(*layers, pooled_head(cin, classes)), (image(size),), {}


case("resnet50", resnet50_theory(4))(lambda: resnet50(4, 32, 10))
case("resnet50-full", resnet50_theory(64), full=True)(lambda: resnet50(64, 64, 1000))


class PreActBlock(nn.Module):
    """Norm and ReLU before each convolution; a projection branches off after the first of them."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.project = None if stride == 1 and cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.project is None else self.project(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


def preact(stem: int, widths: Sequence[int], blocks: int) -> Built:
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, 1, 1, bias=False)]
    cin = stem
    for index, width in enumerate(widths):
        for block in range(blocks):
            layers.append(PreActBlock(cin, width, 2 if block == 0 and index else 1))
            cin = width
    return nn.Sequential(*layers, nn.BatchNorm2d(cin), nn.ReLU(), pooled_head(cin)), (image(16),), {}


# Stem and first stage are one stream, as their widths agree; two blocks a stage.
@case("preact-resnet", times(3, axes(8, 16, 32)))
def preact_resnet() -> Built:
    return preact(8, (8, 16, 32), 2)


# The first stage is wider than the stem, hence a projection and one more factor.
@case("wide-resnet", axes(8) + times(3, axes(16, 32, 64)))
def wide_resnet() -> Built:
    return preact(8, (16, 32, 64), 2)


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to what it is given."""

    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        mid = 4 * growth
        self.norm1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, mid, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(mid), nn.Conv2d(mid, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


# Every layer's new channels are a segment, free by itself, and its bottleneck is another axis. The
# transition starts anew.
@case("densenet", axes(10) + times(3, axes(5, 20)) + axes(12) + times(3, axes(5, 20)))
def densenet() -> Built:
    growth = 5
    layers: list[nn.Module] = [conv_bn_relu(3, 10)]
    width = 10
    for block in range(2):
        for _ in range(3):
            layers.append(DenseLayer(width, growth))
            width += growth
        if block == 0:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 12, 1, bias=False), nn.AvgPool2d(2)]
            width = 12
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), pooled_head(width)), (image(16),), {}


class Inception(nn.Module):
    """Four parallel branches, concatenated (Szegedy et al. 2015)."""

    def __init__(self, cin: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.one = conv_bn_relu(cin, one, 1)
        self.three = nn.Sequential(conv_bn_relu(cin, three[0], 1), conv_bn_relu(*three))
        self.five = nn.Sequential(conv_bn_relu(cin, five[0], 1), conv_bn_relu(*five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn_relu(cin, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


@case("googlenet", axes(8, 12) + axes(8, 6, 12, 3, 4, 5) + axes(10, 8, 16, 4, 7, 6))
def googlenet() -> Built:
    net = nn.Sequential(
        conv_bn_relu(3, 8, 7, 2),
        conv_bn_relu(8, 12),
        Inception(12, 8, (6, 12), (3, 4), 5),
        nn.MaxPool2d(3, 2, 1),
        Inception(29, 10, (8, 16), (4, 7), 6),
        pooled_head(39),
    )
    return net, (image(24),), {}


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1×1 and 3×3 side by side (Iandola et al. 2016)."""

    def __init__(self, cin: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(cin, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


# The classifier is a convolution whose channels are the classes: pinned.
@case("squeezenet", axes(12, 4, 10, 10, 4, 10, 10, 6, 14, 14))
def squeezenet() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(12, 4, 10),
        Fire(20, 4, 10),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(20, 6, 14),
        nn.Conv2d(28, 10, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return net, (image(32),), {}


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Deals the channels of each group out to all groups."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNet v1: grouped 1×1, shuffle, depthwise 3×3, grouped 1×1 (Zhang et al. 2018)."""

    def __init__(self, cin: int, mid: int, cout: int, groups: int, stride: int) -> None:
        super().__init__()
        self.groups, self.stride = groups, stride
        self.a = conv_bn_relu(cin, mid, 1, groups=groups)
        self.b = conv_bn(mid, mid, 3, stride, groups=mid)
        self.c = conv_bn(mid, cout - cin if stride == 2 else cout, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(shuffle(self.a(x), self.groups)))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return F.relu(x + y)


# The stream is 3 groups of 12. Inside a unit, 36 channels are (3 groups of the first convolution) ×
# (3 groups of the second) × 4: the shuffle transposes the first two. Both group factors are that of
# the stream, because input and output are added, so groups are permuted on both at once, and each
# of the 3 × 3 bundles of 4 channels permutes by itself.
@case("shufflenet-v1-units", axes(3) + inside(12, 3) + times(2, inside(4, 3, 3)))
def shufflenet_v1_units() -> Built:
    units = [ShuffleUnit(36, 36, 36, 3, 1) for _ in range(2)]
    return nn.Sequential(conv_bn_relu(3, 36), *units, pooled_head(36)), (image(12),), {}


SHUFFLE_V1_WHY = (
    "in a unit of stride 2 the groups of the next convolution cut across the segments of the concatenation, "
    "so what remains free is a common refinement of both and depends on how finely an axis may be cut"
)


@case("shufflenet-v1", None, why=SHUFFLE_V1_WHY, movable_min=0.0)
def shufflenet_v1() -> Built:
    units = [
        ShuffleUnit(12, 18, 36, 3, 2),
        ShuffleUnit(36, 18, 36, 3, 1),
        ShuffleUnit(36, 36, 72, 3, 2),
        ShuffleUnit(72, 36, 72, 3, 1),
    ]
    return nn.Sequential(conv_bn_relu(3, 12), *units, pooled_head(72)), (image(16),), {}


class ShuffleV2Unit(nn.Module):
    """ShuffleNet v2: half of the channels pass by, half are convolved, then all are shuffled."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        half = cout // 2
        source = cin if stride == 2 else half
        self.left = None
        if stride == 2:
            self.left = nn.Sequential(conv_bn(cin, cin, 3, 2, cin), conv_bn_relu(cin, half, 1))
        self.right = nn.Sequential(
            conv_bn_relu(source, half, 1), conv_bn(half, half, 3, stride, half), conv_bn_relu(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x, x) if self.left is not None else x.chunk(2, 1)
        return shuffle(torch.cat([a if self.left is None else self.left(a), self.right(b)], 1), 2)


def shuffle_v2_theory(stem: int, stages: Sequence[tuple[int, int]], head: int) -> Counter[Factor]:
    """Follows every channel: those made by one convolution and read by the same ones may trade places.

    A channel either passes a unit by or is read by it, depending on the half in which the shuffles
    have put it, so the channels of a convolution fall into runs of different history.
    """
    found = axes(stem)
    made = 0
    for width, units in stages:
        half = width // 2
        found += axes(half)  # the inner axis of the unit of stride 2
        history: dict[tuple[int, int], tuple[str, ...]] = {}
        lanes = [(made, i) for i in range(half)] + [(made + 1, i) for i in range(half)]
        made += 2
        history.update(dict.fromkeys(lanes, ()))
        lanes = [lanes[side * half + i] for i in range(half) for side in (0, 1)]
        for unit in range(units - 1):
            found += axes(half)
            left, right = lanes[:half], lanes[half:]
            for lane in right:
                history[lane] += (f"read by {unit}",)
            new = [(made, i) for i in range(half)]
            made += 1
            history.update(dict.fromkeys(new, ()))
            lanes = [lane for pair in zip(left, new, strict=True) for lane in pair]
        for lane in lanes:
            history[lane] += ("read at the end",)
        runs = Counter((source, tuple(past)) for (source, _), past in history.items())
        found += axes(*runs.values())
    return found + axes(head)


@case("shufflenet-v2", shuffle_v2_theory(8, ((32, 3), (64, 3)), 40))
def shufflenet_v2() -> Built:
    layers: list[nn.Module] = [conv_bn_relu(3, 8, 3, 2)]
    cin = 8
    for width, units in ((32, 3), (64, 3)):
        for unit in range(units):
            layers.append(ShuffleV2Unit(cin, width, 2 if unit == 0 else 1))
            cin = width
    return nn.Sequential(*layers, conv_bn_relu(cin, 40, 1), pooled_head(40)), (image(24),), {}


class InvertedResidual(nn.Module):
    """Expand, depthwise, (squeeze-and-excite,) project, with a shortcut where the shape allows."""

    def __init__(
        self, cin: int, cout: int, stride: int, expand: int, kernel: int = 3, squeeze: int = 0
    ) -> None:
        super().__init__()
        mid = cin * expand
        act = nn.SiLU if squeeze else nn.ReLU6
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [conv_bn(cin, mid, 1), act()]
        layers += [conv_bn(mid, mid, kernel, stride, mid), act()]
        if squeeze:
            layers.append(SqueezeExcite(mid, squeeze))
        self.body = nn.Sequential(*layers, conv_bn(mid, cout, 1))
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


# (out, stride, expand, kernel, squeeze) of each block
Plan = Sequence[tuple[int, int, int, int, int]]


def inverted(stem: int, plan: Plan, head: int) -> Built:
    layers: list[nn.Module] = [conv_bn_relu(3, stem, 3, 2)]
    cin = stem
    for cout, stride, expand, kernel, squeeze in plan:
        layers.append(InvertedResidual(cin, cout, stride, expand, kernel, squeeze))
        cin = cout
    return nn.Sequential(*layers, conv_bn_relu(cin, head, 1), pooled_head(head)), (image(32),), {}


def inverted_theory(stem: int, plan: Plan, head: int) -> Counter[Factor]:
    # A depthwise convolution keeps its axis. A block brings an expanded axis (none if it does not
    # expand), a new stream where there is no shortcut, and the hidden axis of its squeeze.
    found = axes(stem, head)
    cin = stem
    for cout, stride, expand, _, squeeze in plan:
        found += axes(cin * expand if expand != 1 else 1, squeeze or 1)
        if stride != 1 or cin != cout:
            found += axes(cout)
        cin = cout
    return found


MOBILENET_V2: Plan = (
    (4, 1, 1, 3, 0),
    (6, 2, 6, 3, 0),
    (6, 1, 6, 3, 0),
    (8, 2, 6, 3, 0),
    (8, 1, 6, 3, 0),
    (8, 1, 6, 3, 0),
)
MNASNET: Plan = ((4, 1, 1, 3, 0), (6, 2, 3, 3, 0), (6, 1, 3, 3, 0), (10, 2, 3, 5, 0), (10, 1, 3, 5, 0))
EFFICIENTNET: Plan = ((4, 1, 1, 3, 2), (6, 2, 6, 3, 2), (6, 1, 6, 3, 2), (10, 2, 6, 5, 3), (10, 1, 6, 5, 3))
case("mobilenet-v2", inverted_theory(8, MOBILENET_V2, 48))(lambda: inverted(8, MOBILENET_V2, 48))
case("mnasnet", inverted_theory(8, MNASNET, 48))(lambda: inverted(8, MNASNET, 48))
case("efficientnet", inverted_theory(8, EFFICIENTNET, 48))(lambda: inverted(8, EFFICIENTNET, 48))


# A grouped convolution from 4 groups of 6 to 4 groups of 6: groups move as wholes, the same on both
# sides, and the channels inside each group move on either side by themselves. The stem is one axis,
# each stage's stream another.
@case("regnet", axes(8, 24, 32) + times(3, axes(4, 5) + times(2, inside(6, 4))))
def regnet() -> Built:
    blocks = [
        Bottleneck(8, 24, 24, 2, 4, 5),
        Bottleneck(24, 24, 24, 1, 4, 5),
        Bottleneck(24, 24, 32, 2, 4, 5),
    ]
    return nn.Sequential(conv_bn_relu(3, 8, 3, 2), *blocks, pooled_head(32)), (image(32),), {}


class UNet(nn.Module):
    """Two scales down, two up by transposed convolutions, with concatenated skips."""

    def __init__(self, w: int = 6) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv_bn_relu(3, w), conv_bn_relu(w, w))
        self.down2 = nn.Sequential(conv_bn_relu(w, 2 * w), conv_bn_relu(2 * w, 2 * w))
        self.bottom = nn.Sequential(conv_bn_relu(2 * w, 4 * w), conv_bn_relu(4 * w, 4 * w))
        self.up2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2)
        self.dec2 = nn.Sequential(conv_bn_relu(4 * w, 2 * w), conv_bn_relu(2 * w, 2 * w))
        self.up1 = nn.ConvTranspose2d(2 * w, w, 2, 2)
        self.dec1 = nn.Sequential(conv_bn_relu(2 * w, w), conv_bn_relu(w, w))
        self.head = nn.Conv2d(w, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(F.max_pool2d(skip1, 2))
        x = self.bottom(F.max_pool2d(skip2, 2))
        x = self.dec2(torch.cat([self.up2(x), skip2], 1))
        x = self.dec1(torch.cat([self.up1(x), skip1], 1))
        return self.head(x)


@case("unet", times(5, axes(6, 12)) + axes(24, 24))
def unet() -> Built:
    return UNet(), (image(16),), {}


class UpsampleUNet(nn.Module):
    """A U-Net that goes up by interpolation and adds its skip rather than concatenating it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn_relu(3, 8)
        self.bottom = nn.Sequential(conv_bn_relu(8, 16), conv_bn_relu(16, 8))
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        x = F.interpolate(self.bottom(F.avg_pool2d(skip, 2)), scale_factor=2, mode="bilinear")
        return self.head(x + skip)


@case("upsample-unet", axes(8, 16))
def upsample_unet() -> Built:
    return UpsampleUNet(), (image(16),), {}


@case("conv3d", axes(6, 8, 12))
def conv3d() -> Built:
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(2),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )
    return net, (torch.randn(2, 1, 8, 8, 8),), {}


class CausalBlock(nn.Module):
    """Dilated causal convolutions with a shortcut (Bai et al. 2018)."""

    def __init__(self, cin: int, cout: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = nn.Conv1d(cin, cout, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(cout, cout, 3, dilation=dilation)
        self.project = nn.Identity() if cin == cout else nn.Conv1d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(F.pad(x, (self.pad, 0))))
        y = F.relu(self.conv2(F.pad(y, (self.pad, 0))))
        return F.relu(y + self.project(x))


@case("tcn", axes(12, 12, 12, 16, 16))
def tcn() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(CausalBlock(4, 12, 1), CausalBlock(12, 12, 2), CausalBlock(12, 16, 4))
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(x)[:, :, -1])

    return Net(), (torch.randn(2, 4, 20),), {}


# Before a pixel shuffle the channels are (channel, row, column): the channel moves, the sub-pixel
# does not. The last shuffle makes the three colours of the output, so its channels are pinned: of
# the convolution before it only the input moves.
@case("pixel-shuffle", axes(16, 12, 8))
def pixel_shuffle() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3, padding=1),
        nn.PReLU(12),
        nn.Conv2d(12, 8 * 4, 3, padding=1),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Conv2d(8, 3 * 4, 3, padding=1),
        nn.PixelShuffle(2),
    )
    return net, (image(6),), {}


# Group norm ties channels to groups: groups move as wholes, channels inside their group.
@case("groupnorm-net", times(3, axes(4)) + inside(3, 4) + inside(4, 4) + inside(4, 4))
def groupnorm_net() -> Built:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
            self.norm2, self.conv2 = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(F.relu(self.norm1(x)))
            return x + self.conv2(F.relu(self.norm2(y)))

    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.GroupNorm(4, 12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, 2, 1),
        Block(),
        pooled_head(16),
    )
    return net, (image(12),), {}


@case("instancenorm-net", axes(10, 14))
def instancenorm_net() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, padding_mode="reflect"),
        nn.InstanceNorm2d(10, affine=True),
        nn.LeakyReLU(0.2),
        nn.Conv2d(10, 14, 3, 2, 1),
        nn.InstanceNorm2d(14, track_running_stats=True),
        nn.ReLU(),
        nn.ReflectionPad2d(1),
        nn.Conv2d(14, 3, 3),
        nn.Tanh(),
    )
    return net, (image(12),), {}


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, layer norm over channels, inverted bottleneck, layer scale (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@case("convnext", axes(8, 32, 32) + axes(12, 48))
def convnext() -> Built:
    class ChannelNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4),
        ChannelNorm(8),
        ConvNeXtBlock(8),
        ConvNeXtBlock(8),
        ChannelNorm(8),
        nn.Conv2d(8, 12, 2, 2),
        ConvNeXtBlock(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 10),
    )
    return net, (image(32),), {}


class VAE(nn.Module):
    """A variational autoencoder at its mean, with the divergence as second output: the code may move."""

    def __init__(self, code: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 24), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(24, code), nn.Linear(24, code)
        self.decoder = nn.Sequential(nn.Linear(code, 20), nn.ReLU(), nn.Linear(20, 16), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        return self.decoder(mean), divergence


@case("vae", axes(24, 6, 20))
def vae() -> Built:
    return VAE(), (torch.rand(2, 16),), {}


@case("conv-autoencoder", axes(8, 12, 5, 12, 8))
def conv_autoencoder() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convs = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
            self.encode = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU())
            self.code, self.decode0 = nn.Linear(12 * 9, 5), nn.Linear(5, 12 * 9)
            self.decode = nn.Sequential(
                nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.ELU(), nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Sigmoid()
            )

        def forward(self, x: Tensor) -> Tensor:
            code = self.code(self.encode(x).flatten(1))
            return self.decode(F.relu(self.decode0(code)).view(-1, 12, 3, 3))

    return Net(), (image(12, 1),), {}


# The noise is an input: pinned.
@case("dcgan-generator", axes(16, 12, 8))
def dcgan_generator() -> Built:
    def up(cin: int, cout: int, stride: int, padding: int) -> list[nn.Module]:
        conv = nn.ConvTranspose2d(cin, cout, 4, stride, padding, bias=False)
        return [conv, nn.BatchNorm2d(cout), nn.ReLU()]

    layers = up(10, 16, 1, 0) + up(16, 12, 2, 1) + up(12, 8, 2, 1)
    net = nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh())
    return net, (torch.randn(2, 10, 1, 1),), {}


@case("dueling-dqn", axes(8, 12, 24, 20))
def dueling_dqn() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convs = nn.Conv2d(4, 8, 4, 2), nn.Conv2d(8, 12, 3)
            self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten())
            self.value = nn.Sequential(nn.Linear(12 * 9, 24), nn.ReLU(), nn.Linear(24, 1))
            self.advantage = nn.Sequential(nn.Linear(12 * 9, 20), nn.ReLU(), nn.Linear(20, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x / 255.0)
            advantage = self.advantage(x)
            return self.value(x) + advantage - advantage.mean(1, keepdim=True)

    return Net(), (255 * torch.rand(2, 4, 12, 12),), {}


# Recurrent nets -----------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Embedding, recurrent layers, classifier on the final states."""

    def __init__(self, cell: type[nn.RNNBase], hidden: int, layers: int, bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.rnn = cell(12, hidden, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), 4)

    def forward(self, words: Tensor) -> Tensor:
        sequence, _ = self.rnn(self.embedding(words))
        return self.head(sequence.mean(1))


# The gates of a unit move together, so a direction of a layer has one axis.
@case("lstm", axes(12) + times(4, axes(10)))
def lstm() -> Built:
    return Recurrent(nn.LSTM, 10, 2, True), (torch.randint(0, 40, (2, 6)),), {}


@case("gru", axes(12) + times(2, axes(10)))
def gru() -> Built:
    return Recurrent(nn.GRU, 10, 2, False), (torch.randint(0, 40, (2, 6)),), {}


@case("rnn-tanh", axes(12) + axes(10))
def rnn_tanh() -> Built:
    return Recurrent(nn.RNN, 10, 1, False), (torch.randint(0, 40, (2, 6)),), {}


# The hidden state is projected: the cell has its own axis, the projection another.
@case("lstm-projected", axes(12, 10, 6))
def lstm_projected() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 12)
            self.rnn = nn.LSTM(12, 10, proj_size=6)
            self.head = nn.Linear(6, 4)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.rnn(self.embedding(words))[0])

    return Net(), (torch.randint(0, 40, (5, 2)),), {}


@case("lstm-cell-loop", axes(9, 7))
def lstm_cell_loop() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.head = nn.LSTMCell(5, 9), nn.GRUCell(9, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden, cell = x.new_zeros(len(x), 9), x.new_zeros(len(x), 9)
            state = x.new_zeros(len(x), 7)
            for step in range(x.shape[1]):
                hidden, cell = self.lstm(x[:, step], (hidden, cell))
                state = self.gru(hidden, state)
            return self.head(state)

    return Net(), (torch.randn(2, 4, 5),), {}


# Neural fields ------------------------------------------------------------------------------------


class Siren(nn.Module):
    """Sine activations (Sitzmann et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 24), nn.Linear(24, 24), nn.Linear(24, 24)])
        self.head = nn.Linear(24, 3)
        for layer in self.layers[1:]:  # the authors' initial values: the factor of 30 is taken back
            nn.init.uniform_(layer.weight, -((6 / 24) ** 0.5) / 30, (6 / 24) ** 0.5 / 30)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.head(x)


@case("siren", axes(24, 24, 24), calm=True)
def siren() -> Built:
    return Siren(), (2 * torch.rand(2, 2) - 1,), {}


class Triplane(nn.Module):
    """Features looked up on three planes and added or concatenated, then a small MLP (Chan et al. 2022)."""

    def __init__(self, concatenated: bool) -> None:
        super().__init__()
        self.concatenated = concatenated
        self.planes = nn.Parameter(torch.randn(3, 8, 5, 5))
        width = 24 if concatenated else 8
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.Softplus(), nn.Linear(16, 4))

    def forward(self, points: Tensor) -> Tensor:
        pairs = torch.stack([points[:, [0, 1]], points[:, [0, 2]], points[:, [1, 2]]])
        features = F.grid_sample(self.planes, pairs[:, :, None], align_corners=True)[..., 0]  # (3, 8, N)
        if self.concatenated:
            return self.mlp(features.permute(2, 0, 1).reshape(len(points), -1))
        return self.mlp(features.sum(0).T)


# Added, the planes share their feature axis; side by side, each plane's features are a segment of the
# first layer's inputs and move by themselves.
@case("triplane-sum", axes(8, 16))
def triplane_sum() -> Built:
    return Triplane(False), (2 * torch.rand(6, 3) - 1,), {}


@case("triplane-concat", axes(8, 8, 8, 16))
def triplane_concat() -> Built:
    return Triplane(True), (2 * torch.rand(6, 3) - 1,), {}


class NeRF(nn.Module):
    """Encoded positions enter again halfway; density and colour heads (Mildenhall et al. 2020)."""

    def __init__(self, width: int = 20, frequencies: int = 3) -> None:
        super().__init__()
        encoded = 3 + 6 * frequencies
        self.register_buffer("scales", 2.0 ** torch.arange(frequencies), persistent=False)
        self.before = nn.ModuleList([nn.Linear(encoded, width), nn.Linear(width, width)])
        self.after = nn.ModuleList([nn.Linear(width + encoded, width), nn.Linear(width, width)])
        self.density = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        self.view = nn.Linear(width + 3, width // 2)
        self.colour = nn.Linear(width // 2, 3)

    def forward(self, points: Tensor, views: Tensor) -> Tensor:
        angles = (points[..., None] * self.scales).flatten(-2)
        encoded = torch.cat([points, angles.sin(), angles.cos()], -1)
        x = encoded
        for layer in self.before:
            x = F.relu(layer(x))
        x = torch.cat([encoded, x], -1)
        for layer in self.after:
            x = F.relu(layer(x))
        hidden = F.relu(self.view(torch.cat([self.feature(x), views], -1)))
        return torch.cat([torch.sigmoid(self.colour(hidden)), F.softplus(self.density(x))], -1)


@case("nerf", times(5, axes(20)) + axes(10))
def nerf() -> Built:
    return NeRF(), (torch.rand(2, 3), torch.rand(2, 3)), {}
