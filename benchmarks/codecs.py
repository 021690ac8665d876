"""Speed and error of the codecs, beside bitsandbytes, torchao, stock FLARE and a plain copy, in one run.

    python -m benchmarks.codecs --weights 33554432 --threads 2

Every contender encodes and decodes the same Gaussian weights, in turns; the best time of each counts.
GB/s are of float32 weights. A code of R bits cannot have a smaller relative error on a Gaussian source than
2 ** -R (rate-distortion bound): "bits needed" is what the bound asks for the error that was reached.
"""

import argparse
import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.record import record
from nvflare_llm_components.quantization.codec import decode
from nvflare_llm_components.quantization.message import decode_message, encode_message
from nvflare_llm_components.quantization.precision import CODECS, PrecisionPolicy

STD = 0.02


@dataclass(frozen=True)
class Contender:
    """One way to make weights smaller and large again.

    Attributes:
        name: who and what.
        encode: from float32 weights to whatever it makes of them.
        decode: back to float32.
        num_bytes: size of what `encode` made.
    """

    name: str
    encode: Callable[[torch.Tensor], object]
    decode: Callable[[object], torch.Tensor]
    num_bytes: Callable[[object], int]


@dataclass
class Measured:
    """What one contender reached."""

    name: str
    encode_gb_s: float
    decode_gb_s: float
    relative_error: float
    bits_a_weight: float

    @property
    def bits_needed(self) -> float:
        """Bits a weight without which no code can have this error."""
        return -math.log2(self.relative_error) if self.relative_error else math.inf


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def ours(weights: torch.Tensor) -> list[Contender]:
    def contender(name: str) -> Contender:
        codec, size = CODECS[name], weights.numel()
        return Contender(
            f"ours {name}",
            lambda w: codec.encode(w, None),
            lambda e: decode(codec, e.payload, size, None, e.num_nonfinite),
            lambda e: nbytes(e.payload),
        )

    return [contender(name) for name in CODECS]


def our_messages() -> list[Contender]:
    """The same with all that a filter does: policy, checksum, error estimate, checks."""

    def contender(name: str) -> Contender:
        policy = PrecisionPolicy(name)
        return Contender(
            f"ours {name}, whole message",
            lambda w: encode_message({"w": w}, policy),
            lambda m: decode_message(m.values, m.header, None, lazy=False)[0]["w"],
            lambda m: m.traffic.bytes_after,
        )

    return [contender(name) for name in CODECS]


def plain() -> list[Contender]:
    return [
        Contender("plain copy", torch.clone, torch.clone, nbytes),
        Contender("plain .to(float16)", lambda w: w.to(torch.float16), lambda h: h.float(), nbytes),
    ]


def bitsandbytes() -> list[Contender]:
    from bitsandbytes.functional import (
        dequantize_4bit,
        dequantize_blockwise,
        quantize_4bit,
        quantize_blockwise,
    )

    def size(pair: tuple) -> int:
        return nbytes(pair[0]) + nbytes(pair[1].absmax)

    return [
        Contender("bitsandbytes int8", quantize_blockwise, lambda p: dequantize_blockwise(*p), size),
        Contender(
            "bitsandbytes nf4",
            lambda w: quantize_4bit(w, quant_type="nf4"),
            lambda p: dequantize_4bit(*p),
            size,
        ),
    ]


def torchao() -> list[Contender]:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block, int8 = (1, 128), torch.int8

    def encode(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = w.view(-1, block[1])
        scale, zero = choose_qparams_affine(rows, MappingType.SYMMETRIC, block, int8, -127, 127)
        return quantize_affine(rows, block, scale, zero, int8, -127, 127), scale, zero

    def decode(parts: tuple) -> torch.Tensor:
        return dequantize_affine(parts[0], block, parts[1], parts[2], int8, -127, 127)

    def size(parts: tuple) -> int:
        return nbytes(parts[0]) + nbytes(parts[1])

    return [Contender("torchao int8, block 128", encode, decode, size), *torchao_nf4()]


def torchao_nf4() -> list[Contender]:
    with contextlib.suppress(ImportError):
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        def size(nf4: torch.Tensor) -> int:
            return (
                nbytes(nf4.quantized_data) + nbytes(nf4.quantized_scalers) + nbytes(nf4.quantization_factor)
            )

        return [Contender("torchao nf4", to_nf4, lambda nf4: nf4.get_original_weight(), size)]
    return []


def stock() -> list[Contender]:
    """FLARE's ModelQuantizer; its 8 and 4 bits need CUDA."""
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    quantizer, dequantizer, fl_ctx = ModelQuantizer("float16"), ModelDequantizer(), FLContext()

    def encode(value: object) -> object:
        return quantizer.quantization({"w": value}, fl_ctx)

    def decode(result: tuple) -> torch.Tensor:
        params, state, source = result
        restored = dequantizer.dequantization(dict(params), state, "float16", source, fl_ctx)
        return torch.as_tensor(restored["w"])

    def size(result: tuple) -> int:
        return int(result[0]["w"].nbytes)

    return [
        Contender("stock float16, torch", encode, decode, size),
        Contender("stock float16, NumPy", lambda w: encode(w.numpy()), decode, size),
    ]


def contenders(weights: torch.Tensor) -> list[Contender]:
    found = [*plain(), *ours(weights), *our_messages()]
    for peer in (bitsandbytes, torchao, stock):
        try:
            found += peer()
        except ImportError as e:
            print(f"without {peer.__name__}: {e}")
    return found


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(weights: torch.Tensor, repeats: int) -> list[Measured]:
    """Measure all contenders on one tensor, in turns."""
    rivals = contenders(weights)
    best = {rival.name: [math.inf, math.inf] for rival in rivals}
    facts: dict[str, tuple[float, float]] = {}
    for _ in track(range(repeats + 1), description="rounds, the first to warm up"):
        for rival in rivals:
            encoded = rival.encode(weights)
            if rival.name not in facts:
                error = (rival.decode(encoded).float().view(-1) - weights.view(-1)).norm() / weights.norm()
                facts[rival.name] = float(error), 8 * rival.num_bytes(encoded) / weights.numel()
            times = (
                seconds(lambda r=rival: r.encode(weights), weights.device),
                seconds(lambda r=rival, e=encoded: r.decode(e), weights.device),
            )
            best[rival.name] = [min(pair) for pair in zip(best[rival.name], times, strict=True)]
    size_gb = nbytes(weights) / 1e9
    return [Measured(name, size_gb / enc, size_gb / dec, *facts[name]) for name, (enc, dec) in best.items()]


def verdicts(rows: list[Measured]) -> list[tuple[str, float, str, float]]:
    """(what, found, comparison, target) of DESIGN's column for the codecs."""
    by_name = {row.name: row for row in rows}
    int8, nf4, int2, fp16 = (by_name[f"ours {name}"] for name in ("int8", "nf4", "int2", "fp16"))
    found = [
        ("int8 relative error", int8.relative_error, "<=", 0.0070),
        ("nf4 relative error", nf4.relative_error, "<=", 0.092),
        ("nf4 bits a weight", nf4.bits_a_weight, "<=", 4.13),
        ("int2 bits a weight", int2.bits_a_weight, "<=", 2.2),
        ("int2 encode GB/s", int2.encode_gb_s, ">=", 1.0),
        ("int2 decode GB/s", int2.decode_gb_s, ">=", 2.0),
    ]
    peer = by_name.get("bitsandbytes int8")
    if peer:
        found.append(("int8 encode, x bitsandbytes", int8.encode_gb_s / peer.encode_gb_s, ">=", 3.0))
        found.append(("int8 decode, x bitsandbytes", int8.decode_gb_s / peer.decode_gb_s, ">=", 1.0))
        of_nf4 = nf4.encode_gb_s / by_name["bitsandbytes nf4"].encode_gb_s
        found.append(("nf4 encode, x bitsandbytes", of_nf4, ">=", 5.0))
    if "stock float16, torch" in by_name:
        of_fp16 = fp16.encode_gb_s / by_name["stock float16, torch"].encode_gb_s
        found.append(("fp16 encode, x stock", of_fp16, ">=", 1.8))
    return found


def show(rows: list[Measured], console: Console) -> None:
    table = Table(title="Codecs on Gaussian weights")
    for column in (
        "contender",
        "encode GB/s",
        "decode GB/s",
        "relative error",
        "bits a weight",
        "bits needed",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        cells = (row.encode_gb_s, row.decode_gb_s, row.relative_error, row.bits_a_weight, row.bits_needed)
        formats = ("{:.2f}", "{:.2f}", "{:.5f}", "{:.3f}", "{:.2f}")
        table.add_row(row.name, *(form.format(cell) for form, cell in zip(formats, cells, strict=True)))
    console.print(table)
    for what, found, sign, target in verdicts(rows):
        reached = found <= target if sign == "<=" else found >= target
        console.print(f"{'reached' if reached else 'MISSED '}  {what}: {found:.4g} (target {sign} {target})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=int, default=1 << 25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(options.weights, generator=generator) * STD).to(options.device)
    rows = measure(weights, options.repeats)
    show(rows, Console(width=120))
    record(
        "codecs",
        map(asdict, rows),
        weights=options.weights,
        threads=options.threads,
        repeats=options.repeats,
        device=options.device,
    )


if __name__ == "__main__":
    main()
