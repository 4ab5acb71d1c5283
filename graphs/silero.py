"""Silero VAD at 16 kHz, the names of the tinygrad/safetensors release.

The graph is that of the ONNX twin: reflect padding, a fixed short-time Fourier transform as a strided
convolution (real parts first, imaginary parts after), magnitudes, four convolutions, an LSTM cell that is
carried from chunk to chunk, ReLU, a 1x1 convolution and a sigmoid. The skeleton runs over consecutive
chunks from an empty state, as the detector is used, so that the recurrent state stays inside the network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "silero-vad"
_RANKS = {
    "stft_conv.weight": 3,
    **{f"{layer}.{kind}": rank for layer in ("conv1", "conv2", "conv3", "conv4", "final_conv")
       for kind, rank in (("weight", 3), ("bias", 1))},
    **{f"lstm_cell.{kind}": rank for kind, rank in
       (("weight_ih", 2), ("weight_hh", 2), ("bias_ih", 1), ("bias_hh", 1))},
}  # fmt: skip


class _Silero(nn.Module):
    def __init__(self, window: int, widths: list[int], hidden: int) -> None:
        super().__init__()
        self.bins = window // 2 + 1
        self.pad = window // 4
        self.stft_conv = nn.Conv1d(1, 2 * self.bins, window, stride=window // 2, bias=False)
        self.conv1 = nn.Conv1d(self.bins, widths[0], 3, padding=1)
        self.conv2 = nn.Conv1d(widths[0], widths[1], 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(widths[1], widths[2], 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(widths[2], widths[3], 3, padding=1)
        self.lstm_cell = nn.LSTMCell(widths[3], hidden)
        self.final_conv = nn.Conv1d(hidden, 1, 1)

    def forward(self, audio: Tensor) -> Tensor:
        """``audio``: (batch, chunks, samples). Returns speech probabilities (batch, chunks)."""
        state: tuple[Tensor, Tensor] | None = None
        speech = []
        for chunk in audio.unbind(1):
            x = self.stft_conv(F.pad(chunk, (0, self.pad), mode="reflect").unsqueeze(1))
            x = (x[:, : self.bins] ** 2 + x[:, self.bins :] ** 2).sqrt()
            x = F.relu(self.conv1(x))
            x = F.relu(self.conv2(x))
            x = F.relu(self.conv3(x))
            x = F.relu(self.conv4(x)).squeeze(-1)
            state = self.lstm_cell(x, state)
            speech.append(torch.sigmoid(self.final_conv(F.relu(state[0]).unsqueeze(-1))).squeeze(-1))
        return torch.cat(speech, dim=1)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise Silero VAD; inputs ``(2, 2, 576)``, two chunks of 32 ms with 4 ms of context."""
    shapes = signature.shapes
    if {name: len(shape) for name, shape in shapes.items()} != _RANKS:
        return None
    window = shapes["stft_conv.weight"][2]
    if window != 256:
        return None
    with torch.device("meta"):
        widths = [shapes[f"conv{i}.weight"][0] for i in range(1, 5)]
        module = _Silero(window, widths, shapes["lstm_cell.weight_hh"][1])
    return ws.Skeleton(module.eval(), (torch.randn(2, 2, 576) * 0.1,), "Silero VAD 16 kHz")
