"""An amplifier as a small recurrent network: trained here, exported to C++, and run on a WAV file.

Recurrent networks of 8 to 64 units stand in for guitar amplifiers (Wright, Damskaegg & Valimaki
2019, "Real-time black-box modelling with recurrent neural networks"). Here the amplifier is a
formula: a filter, a bend that depends on how loud it was a moment ago, and another filter. Strings
are plucked by Karplus & Strong's loop (1983). A GRU and a linear layer learn from some seconds of
both; then ``fused_rnn.export_cpp`` writes them as C++, ``amplifier.cpp`` runs them over a file in
blocks of 64 samples, and what comes out is compared with Python's.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch
from common import Run, arguments, cosine, detach, find_cell, picture, start, train_step
from torch import Tensor, nn

import fused_rnn

RATE = 22_050  # samples per second
CHUNK = 512  # samples of a step of training; the states go on
HERE = Path(__file__).resolve().parent


def strings(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Plucked strings, a new one every third of a second: [samples] in -1 .. 1."""
    sound = np.zeros(int(seconds * RATE))
    for begin in range(0, len(sound), RATE // 3):
        period = int(RATE / (82.4 * 2 ** (rng.integers(0, 30) / 12)))  # from the low E of a guitar
        line = rng.uniform(-1, 1, period)
        rest = np.empty(len(sound) - begin)
        for at in range(0, len(rest), period):  # each period is the last one, a bit smoother
            n = min(period, len(rest) - at)
            rest[at : at + n] = line[:n]
            line = 0.498 * (line + np.roll(line, 1))
        sound[begin:] += rest * rng.uniform(0.2, 1)
    return (sound / np.abs(sound).max()).astype(np.float32)


def amplified(sound: np.ndarray) -> np.ndarray:
    """What the amplifier makes of it, sample by sample."""
    out, bass, loud, warm = [], 0.0, 0.0, 0.0
    for x in sound.tolist():
        bass += 0.02 * (x - bass)
        loud += 0.001 * (abs(x) - loud)
        bent = math.tanh((x - bass) * 8 / (1 + 6 * loud) + 0.2) - math.tanh(0.2)
        warm += 0.4 * (bent - warm)
        out.append(0.7 * warm)
    return np.array(out, np.float32)


class Amplifier(nn.Module):
    """[T, B, 1] -> [T, B, 1], and the states."""

    def __init__(self, cell: type[nn.RNNBase], hidden: int) -> None:
        super().__init__()
        self.rnn = cell(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state: object = None) -> tuple[Tensor, object]:
        y, state = self.rnn(x, state)
        return self.head(y), state


def error(found: Tensor, wanted: Tensor) -> Tensor:
    """The power of what is wrong as a part of the power of what is right."""
    return (found - wanted).square().mean() / wanted.square().mean()


def write_wav(path: Path, sound: Tensor) -> None:
    samples = (sound * 32768).round().clamp(-32768, 32767).short().numpy()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


def read_wav(path: Path) -> Tensor:
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return torch.from_numpy(samples.astype(np.float32) / 32768)


def compiled(model: Amplifier, folder: Path) -> Path | None:
    """The program that runs sound through the model, if there is a compiler."""
    fused_rnn.export_cpp(model.rnn, folder, head=model.head, name="network")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    program = folder / "amplifier"
    sources = [str(HERE / "amplifier.cpp"), str(folder / "network.cpp")]
    flags = ["-std=c++17", "-O2", "-march=native", "-mtune=generic", f"-I{folder}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True)
    return program


def run_both(run: Run, model: Amplifier, sound: Tensor) -> dict[str, float]:
    """The network over a WAV file, in Python and in C++; how far both are apart, in steps of the
    file's 16 bits, and what a sample takes in C++."""
    before, after = run.path("strings.wav"), run.path("amplified.wav")
    write_wav(before, sound)
    x = read_wav(before)
    with torch.no_grad():
        ours = model(x.view(-1, 1, 1))[0].flatten()
    program = compiled(model, run.path("network"))
    if program is None:
        run.print("there is no C++ compiler: exported, not run")
        return {}
    done = subprocess.run([program, before, after], check=True, capture_output=True, text=True)
    apart = (read_wav(after) - ours.clamp(-1, 32767 / 32768)).abs().max().item() * 32768
    return {"apart_in_steps_of_16_bits": apart, "microseconds_per_sample": float(done.stdout)}


def main() -> None:
    parser = arguments(__doc__, "amplifier", cell="gru", hidden=16, batch=32, lr=1e-2, steps=400)
    parser.add_argument("--seconds", type=float, default=24.0, help="of sound to learn from")
    args = parser.parse_args()
    run = start(args)
    rng = np.random.default_rng(args.seed)
    dry = strings(args.seconds, rng)
    held_out = strings(4.0, rng)
    lanes = len(dry) // (args.batch * CHUNK) * CHUNK
    if lanes < CHUNK:
        raise SystemExit(f"--seconds: expected {args.batch * CHUNK / RATE:.1f} or more")
    x, wanted = (
        torch.from_numpy(sound[: args.batch * lanes]).view(args.batch, lanes, 1).transpose(0, 1)
        for sound in (dry, amplified(dry))
    )
    x, wanted = x.to(run.device), wanted.to(run.device)
    model = Amplifier(find_cell(args.cell), args.hidden).to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = cosine(optimizer, args.steps)
    checkpoint = run.checkpoint(model=model, optimizer=optimizer, schedule=schedule)
    trained = run.distribute(model)
    first = checkpoint.load()
    losses, state = checkpoint.extra or ([], None)
    for step in run.progress(range(first, args.steps)):
        at = step * CHUNK % lanes
        y, state = trained(x[at : at + CHUNK], detach(state) if at else None)
        loss = error(y, wanted[at : at + CHUNK])
        train_step(loss, model, optimizer, schedule)
        losses.append(loss.item())
        checkpoint.save_now_and_then(step + 1, (losses, detach(state)))
    checkpoint.save(args.steps, (losses, detach(state)))
    if not run.is_main:
        return run.write({})
    model.cpu()

    sound, right = torch.from_numpy(held_out), torch.from_numpy(amplified(held_out))
    with torch.no_grad():
        found = model(sound.view(-1, 1, 1))[0].flatten()
    figures = {
        "error_held_out": error(found, right).item(),
        "error_of_silence": 1.0,
        "error_of_a_gain": error(sound * (sound @ right / (sound @ sound)), right).item(),
        **run_both(run, model, sound),
    }
    with picture(run.path("amplifier.png"), figsize=(9, 6)) as figure:
        top, bottom = figure.subplots(2)
        top.semilogy(losses)
        top.set(xlabel="step", ylabel="error, part of the power")
        window = slice(RATE, RATE + 400)
        for name, values in (("strings", sound), ("amplifier", right), ("network", found)):
            bottom.plot(values[window], label=name, linewidth=1)
        bottom.set(xlabel="sample")
        bottom.legend()
    run.write(figures)


if __name__ == "__main__":
    main()
