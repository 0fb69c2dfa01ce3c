"""edgeattn export: a Hugging Face checkpoint to a folder that runs here and in stock onnxruntime."""
import argparse
import sys
from pathlib import Path

from edgeattn.apps import options

HELP = "turn a Hugging Face checkpoint or a GGUF file into a quantised ONNX folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="folder with config.json and *.safetensors (also of GPTQ, AWQ or HQQ), a GGUF file, "
                        "or nano for the bundled model")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="folder to write; an earlier export there is replaced")
    parser.add_argument("--precision", choices=options.PRECISIONS,
                        help="weights (int4; ternary for a checkpoint that is); the embedding and the head of intN and ternary have 8 bits")
    parser.add_argument("--bits", type=float, metavar="N",
                        help="the same as a number: 2, 3, 4, 8, or an average as 3.25, for which every matrix gets a width of its own")
    parser.add_argument("--quantiser", default="auto", metavar="NAME",
                        help="rtn, hqq, awq, gptq or boa (gptq below 4 bits or with --calibration, else rtn)")
    parser.add_argument("--calibration", metavar="FILE",
                        help="text like what the model will read, for gptq, awq and --mixed; without it the model says some itself")
    parser.add_argument("--mixed", default="auto", metavar="NAME", help="how widths for an average are chosen: loss, lim or zd (loss)")
    parser.add_argument("--allow-requantize", action="store_true",
                        help="round weights again that the checkpoint holds quantised; without, they stay as they are")
    parser.add_argument("--group-size", type=options.whole(1), default=32, metavar="N", help="weights that share a scale (32)")
    parser.add_argument("--ternary-layout", choices=options.TERNARY_LAYOUTS, default="panels",
                        help="how ternary weights lie: panels (2 bits, any device); sparse (CPU: skips what is zero after squared ReLU); "
                             "dense (CPU: sparse, and 1.6 bits)")
    parser.add_argument("--target", default="generic", metavar="NAME", help="the device whose defaults are recorded (generic)")
    parser.add_argument("-c", "--ctx-size", type=options.whole(1), metavar="N", help="longest context the export allows")


def main(args: argparse.Namespace) -> int:
    from edgeattn.apps import models
    from edgeattn.apps.progress import Progress
    checkpoint = models.find(args.checkpoint)
    if (checkpoint / "edgeattn.json").is_file():
        raise ValueError(f"{checkpoint}: is an export already; give the Hugging Face checkpoint it was made from")
    from edgeattn.exporters.export import export
    precision = args.precision if args.bits is None else f"int{args.bits:g}"
    with Progress(f"exporting {checkpoint.name} to {args.output}", patience=0) as progress:
        report = export(checkpoint, args.output, precision=precision, group_size=args.group_size, target=args.target,
                        ctx_size=args.ctx_size, progress=progress.exporting, quantiser=args.quantiser, calibration=args.calibration,
                        mixed=args.mixed, preparing=progress.preparing, ternary_layout=args.ternary_layout,
                        allow_requantize=args.allow_requantize)
    models.warn_requantised(report, args.allow_requantize)
    print(summary(Path(args.output)))
    print(f"try it: edgeattn chat -m {args.output}", file=sys.stderr)
    return 0


def summary(folder: Path) -> str:
    """What an export is, in a few lines."""
    from edgeattn.apps import terminal
    from edgeattn.apps.weights import Weights
    from edgeattn.runtime import read_config
    config = read_config(folder)
    about, weights = config["model"], Weights(folder)
    lines = [f"{folder}: {config['architecture']}, {terminal.count(weights.params)} parameters, {config['precision']}, "
             f"{terminal.size(weights.bytes)}, context {about['ctx_size']}",
             f"{about['num_layers']} layers, hidden {about['hidden_size']}, {about['num_heads']} heads, {about['kv_heads']} KV heads of "
             f"{about['head_dim']}, vocabulary {about['vocab_size']}"]
    if mixed := config.get("mixed"):
        lines.append(f"{mixed['bits']:.3f} bits a weight by {mixed['method']}, KL {mixed['predicted_kl']:.3g} predicted, "
                     f"{mixed['measured_kl']:.3g} measured")
    return "\n".join([*lines, verify_line(config.get("verify") or {})])


def verify_line(report: dict) -> str:
    """The figures of exporters/check.py for people."""
    if not report:
        return "not verified"
    against = report.get("checkpoint_in") or report.get("against")
    return (f"verified over {report['tokens']} tokens, {report['export_in']} against {against}: rms error {report['rms_error']:.2g} of the "
            f"logits' standard deviation (largest {report['max_error']:.2g}), top-1 agreement {report['top1']:.0%}, "
            f"mean KL {report['mean_kl']:.2g}")
