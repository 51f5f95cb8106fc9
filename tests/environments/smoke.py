"""What `matrix.py` runs in each environment: every step starts the installed commands, as a user does.

    python smoke.py import names train upscale ...

Runs in the current folder, where later steps find what earlier ones left. Prints a line of JSON for each step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NETWORK = {
    "type": "ESC",
    "dim": 8,
    "pdim": 4,
    "kernel_size": 3,
    "n_blocks": 1,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
    "upscaling_factor": 2,
}
NAMES = {
    "ARCH_REGISTRY": ["ESC", "ESCFP", "ESCReal", "ESCRealM", "ESCRIB", "ESCLTE", "ConvAttn", "FlashWindowAttention"],
    "MODEL_REGISTRY": ["ESCModel", "ESRModel", "ESCRealGANModel", "RealHATMSEModel", "ESCLTEModel"],
    "DATASET_REGISTRY": ["DownsampleImageDataset", "ArbitraryScaleDataset"],
}
WEIGHTS = "experiments/trial/models/net_g_latest.pth"
SECONDS = 600


class Failed(Exception):
    """What a step has to say."""


def command(*arguments: str, status: int = 0, **environment: str) -> str:
    """Run to the end; returns all that was printed."""
    done = subprocess.run(
        list(arguments),
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    if done.returncode != status or "Traceback (most recent call last)" in done.stdout:
        raise Failed(f"{' '.join(arguments)[:200]} ended with {done.returncode}: {done.stdout[-1500:]}")
    return done.stdout


def basicsr(*arguments: str, status: int = 0, **environment: str) -> str:
    """Run the console command of this environment."""
    return command(str(Path(sys.executable).parent / "basicsr"), *arguments, status=status, **environment)


def python(code: str, status: int = 0, **environment: str) -> str:
    """Run code in a new process of this environment."""
    return command(sys.executable, "-c", code, status=status, **environment)


def expect(text: str, part: str) -> None:
    """Raises Failed: `part` is not in `text`."""
    if part not in text:
        raise Failed(f"{part!r} is not in: {text[-1500:]}")


def step_import() -> str:
    """Versions of what counts."""
    return python(
        "import sys, esc_arch, basicsr, torch, torchvision, numpy, cv2;"
        "print('Python', sys.version.split()[0], 'torch', torch.__version__, 'torchvision', torchvision.__version__,"
        "'numpy', numpy.__version__, 'OpenCV', cv2.__version__, 'basicsr', basicsr.__version__)"
    ).strip()


def step_names() -> str:
    """Every registered name is there after `import esc_arch`."""
    code = f"import esc_arch\nfrom basicsr.utils import registry\nfor kind, names in {NAMES!r}.items():\n"
    python(code + "    for name in names: getattr(registry, kind).get(name)")
    return f"{sum(map(len, NAMES.values()))} names"


def train(name: str = "trial", **logger: object) -> str:
    """Train for four iterations, with validation, and return the log."""
    data = {"dataroot_gt": "gt", "io_backend": {"type": "disk"}}
    options = {
        "name": name,
        "model_type": "ESCModel",
        "scale": 2,
        "num_gpu": 0,
        "manual_seed": 0,
        "datasets": {
            "train": {
                "type": "DownsampleImageDataset",
                **data,
                "gt_size": 16,
                "num_worker_per_gpu": 1,
                "batch_size_per_gpu": 2,
            },
            "val": {"name": "Cuts", "type": "DownsampleImageDataset", **data},
        },
        "network_g": NETWORK,
        "path": {"pretrain_network_g": None},
        "train": {
            "ema_decay": 0.5,
            "optim_g": {"type": "AdamW", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 0.5},
            "total_iter": 4,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 2,
            "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}},
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 2, "use_tb_logger": True, **logger},
    }
    Path(f"{name}.yml").write_text(json.dumps(options), encoding="utf-8")  # JSON is YAML
    return basicsr("train", "-opt", f"{name}.yml", WANDB_MODE="offline")


def step_train() -> str:
    """A training through BasicSR's pipeline, from images to a checkpoint and figures."""
    from PIL import Image
    from skimage.data import astronaut

    Path("gt").mkdir(exist_ok=True)
    for index in range(4):
        Image.fromarray(astronaut()[60 * index : 60 * index + 48, 100:148]).save(f"gt/{index}.png")
    log = train()
    expect(log, "psnr")
    if not Path(WEIGHTS).is_file():
        raise Failed(f"The training left no {WEIGHTS}: {log[-1500:]}")
    return "4 iterations"


def step_resume() -> str:
    """The same training again, from its state."""
    log = basicsr("train", "-opt", "trial.yml", "--auto_resume", "--force_yml", "train:total_iter=6")
    expect(log, "iter:       6")
    return "2 iterations more"


def step_upscale() -> str:
    """A picture by the checkpoint of that training."""
    from PIL import Image

    expect(basicsr("upscale", "-i", "gt/0.png", "-o", "large.png", "-m", WEIGHTS, "-g", "-1"), "1 done")
    size = Image.open("large.png").size
    if size != (96, 96):
        raise Failed(f"large.png is {size}")
    return "96 x 96"


def step_convert() -> str:
    """The checkpoint to safetensors and back, with the same weights."""
    basicsr("convert", WEIGHTS, "-o", "net.safetensors")
    basicsr("convert", "net.safetensors", "-o", "net.pth")
    python(
        f"import torch\na, b = (torch.load(f, weights_only=True)['params_ema'] for f in ({WEIGHTS!r}, 'net.pth'))\n"
        "assert a and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)"
    )
    return "the same weights"


def exports() -> bool:
    """Whether this PyTorch is new enough to export."""
    return python("import torch; print(torch.__version__ >= (2, 10))").strip() == "True"


def refused_export(file: str) -> str:
    """An older PyTorch is told of."""
    expect(basicsr("export", "-m", WEIGHTS, "-o", file, status=2), "Exporting needs PyTorch 2.10 or newer")
    return "refused by name"


def step_export() -> str:
    """What export needs no extra for."""
    if not exports():
        return refused_export("net.pt2")
    return basicsr("export", "-m", WEIGHTS, "-o", "net.pt2").splitlines()[-1]


def with_onnx() -> str:
    """ONNX, compared with PyTorch by ONNX Runtime."""
    if not exports():
        return refused_export("net.onnx")
    return basicsr("export", "-m", WEIGHTS, "-o", "net.onnx").splitlines()[-1]


def without_onnx() -> str:
    """The extra is named."""
    expect(basicsr("export", "-m", WEIGHTS, "-o", "none.onnx", status=2), 'pip install "esc-arch[onnx]"')
    return "named"


def with_plot() -> str:
    """Curves of a training."""
    train("plotted")
    if not Path("experiments/plotted/training.png").is_file():
        raise Failed("no training.png")
    return "training.png"


def without_plot() -> str:
    """The extra is named in the log of the training."""
    expect(train("plain"), 'pip install "esc-arch[plot]"')
    return "named"


PUBLISH = (
    "publish", "-m", WEIGHTS, "-o", "4x-Smoke", "--name", "Smoke", "--author", "Jane", "--license", "MIT",
    "--dataset", "DIV2K", "--description", "A test.", "--tags", "photo", "--no-onnx",
)  # fmt: skip


def with_publish() -> str:
    """A folder to share."""
    return basicsr(*PUBLISH).splitlines()[-1]


def without_publish() -> str:
    """The extra is named."""
    expect(basicsr(*PUBLISH, status=2), 'pip install "esc-arch[publish]"')
    return "named"


def with_spandrel() -> str:
    """A checkpoint through spandrel's own loader."""
    python(
        "import esc_arch.integrations.spandrel as ours, spandrel\nours.install()\n"
        f"print(spandrel.ModelLoader('cpu').load_from_file({WEIGHTS!r}).scale)"
    )
    return "loaded"


def without_spandrel() -> str:
    """The extra is named."""
    code = "import esc_arch.integrations.spandrel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False)
    expect(done.stderr, 'pip install "esc-arch[spandrel]"')
    return "named"


def with_video() -> str:
    """A video of four frames."""
    python(
        "import av, numpy as np\nwith av.open('in.mp4', 'w') as file:\n"
        "    stream = file.add_stream('libx264', rate=25); stream.width = stream.height = 32\n"
        "    for index in range(4):\n"
        "        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * index, np.uint8), format='rgb24')\n"
        "        for packet in stream.encode(frame): file.mux(packet)\n"
        "    for packet in stream.encode(): file.mux(packet)\n"
    )
    expect(basicsr("upscale", "-i", "in.mp4", "-o", "large.mp4", "-m", WEIGHTS, "-g", "-1"), "1 done")
    return "4 frames"


def without_video() -> str:
    """The extra is named."""
    Path("none.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    text = basicsr("upscale", "-i", "none.mp4", "-o", "larger.mp4", "-m", WEIGHTS, "-g", "-1", status=1)
    expect(text, 'pip install "esc-arch[video]"')
    return "named"


def with_lpips() -> str:
    """The loss; where the backbone's weights cannot be downloaded, the message says so."""
    return python(
        "import esc_arch\ntry:\n    esc_arch.LPIPSLoss(net='squeeze'); print('built')\n"
        "except esc_arch.UserError as error:\n"
        "    assert 'could not be downloaded' in str(error), error; print('installed; no weights here')"
    ).splitlines()[-1]


def without_lpips() -> str:
    """The extra is named."""
    python(
        "import esc_arch\ntry:\n    esc_arch.LPIPSLoss()\nexcept esc_arch.UserError as error:\n"
        "    assert 'pip install \"esc-arch[lpips]\"' in str(error), error\nelse: raise SystemExit('built')"
    )
    return "named"


def with_wandb() -> str:
    """A training that is logged, without a network."""
    train("logged", wandb={"project": "smoke", "resume_id": None})
    if not Path("wandb").is_dir():
        raise Failed("wandb left nothing")
    return "logged offline"


def without_wandb() -> str:
    """The extra is named, before the training."""
    try:
        train("unlogged", wandb={"project": "smoke", "resume_id": None})
    except Failed as error:
        expect(str(error), 'pip install "esc-arch[wandb]"')
        return "named"
    raise Failed("trained without wandb")


STEPS: dict[str, Callable[[], str]] = {
    name.removeprefix("step_").replace("_", "-"): function
    for name, function in list(globals().items())
    if name.startswith(("step_", "with_", "without_"))
}


def main(names: list[str]) -> None:
    """Run steps, all of them whatever becomes of any."""
    for name in names:
        start = time.perf_counter()
        try:
            ok, said = True, STEPS[name]()
        except (Failed, OSError, ImportError, subprocess.TimeoutExpired) as error:
            ok, said = False, str(error)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"step": name, "ok": ok, "seconds": seconds, "said": said}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
