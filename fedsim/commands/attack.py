"""`fedsim attack`: reconstruct the images behind a gradient of one's own."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.commands.base import DEFAULT_OUTPUT, make_console
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.payload_attack import CheckedPayload, PayloadResult
    from fedsim.payload_config import PayloadAttackConfig


def attack_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim attack`."""
    parser.add_argument(
        "payload", type=Path, metavar="PAYLOAD", help="weights and a gradient or update: see docs/attacks.md"
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG|key=value",
        help="a YAML file and settings by dotted path, e.g. attack.iterations=1000 (`fedsim list payload`)",
    )
    parser.add_argument("--after", type=Path, metavar="FILE", help="weights one round after those in PAYLOAD")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="the private images, to score with")
    parser.add_argument("--model", metavar="NAME|module:function", help="the network (default: lenet)")
    parser.add_argument("--shape", metavar="CxHxW", help="shape of an image (default: 3x32x32)")
    parser.add_argument("--attack", metavar="NAME", help="the attack (default: gia)")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="output root (default: runs)"
    )
    parser.add_argument("--resume", action="store_true", help="attack again where an attack was interrupted")
    parser.add_argument("--dry-run", action="store_true", help="check everything, attack nothing")


def attack(options: Namespace) -> int:
    """Attack a payload and write what was found."""
    from fedsim.payload_attack import attack_payload, check_payload

    config = _config(options)
    checked = check_payload(config, options.payload, options.after, options.truth)
    folder = options.output / config.name
    console = make_console()
    console.print(checked.describe(), highlight=False, soft_wrap=True)
    finished = _check_folder(folder, checked, options.resume)
    if options.dry_run or finished:
        return 0
    _write_config(folder, checked)
    result = attack_payload(checked)
    _write(folder, checked, result)
    if result.learned:
        console.print(result.learned, highlight=False, soft_wrap=True)
    console.print(result.images.to_string(index=False), highlight=False)
    console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
    return 0


def _config(options: Namespace) -> "PayloadAttackConfig":
    from fedsim.commands.base import split_settings
    from fedsim.payload_config import parse_payload_config
    from fedsim.settings import merged, parse_overrides, read_yaml

    path, overrides = split_settings(options.settings)
    chosen: dict[str, Any] = {}
    if options.model:
        named = {"name": "custom", "factory": options.model} if ":" in options.model else {"name": options.model}
        chosen["model"] = named
    if options.attack:
        chosen["attack"] = {"name": options.attack}
    if options.shape:
        chosen["shape"] = _shape(options.shape)
    data = merged({} if path is None else read_yaml(path), merged(chosen, parse_overrides(overrides)))
    return parse_payload_config(data, str(path or "settings"))


def _shape(text: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--shape: {text!r} must be channels, height and width, e.g. 1x28x28")
    return [int(part) for part in parts]


def _check_folder(folder: Path, checked: "CheckedPayload", resume: bool) -> bool:
    """Return whether the folder holds the finished result of this very attack already.

    Raises:
        ConfigError: If it holds something else, or this attack and `resume` was not asked for.
    """
    from fedsim.files import check_folder
    from fedsim.settings import read_yaml

    def is_same(saved: Path) -> bool:
        return read_yaml(saved) == _identity(checked)

    check_folder(folder, "attack.yaml", "attack", is_same, resume, "name=…")
    return (folder / "result.json").exists()


def _identity(checked: "CheckedPayload") -> dict[str, Any]:
    return {"payload_sha256": checked.fingerprint, **checked.config.model_dump(mode="json")}


def _write_config(folder: Path, checked: "CheckedPayload") -> None:
    import yaml

    from fedsim.files import write_atomically

    text = yaml.safe_dump(_identity(checked), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "attack.yaml", text.encode())


def _write(folder: Path, checked: "CheckedPayload", result: "PayloadResult") -> None:
    """Write the table, the images as arrays and as a picture, and last `result.json`, which marks the end."""
    import io

    import numpy as np

    from fedsim.files import write_atomically
    from fedsim.privacy.audit import as_bytes
    from fedsim.results import grid, write_json

    found = result.found.images[0]
    rows = [as_bytes(found)]
    if checked.truth is not None:
        order = result.images["matched"].tolist()
        rows = [as_bytes(checked.truth.images[0]), as_bytes(found[order])]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=found.numpy(), labels=result.found.labels[0].numpy())
    write_atomically(folder / "reconstructions.npz", buffer.getvalue())
    write_atomically(folder / "reconstructions.png", grid(rows))
    write_atomically(folder / "images.csv", result.images.to_csv(index=False).encode())
    write_json(folder / "result.json", result.summary(checked))
