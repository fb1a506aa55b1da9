"""Sets on the Hugging Face hub, images above all, through the `datasets` library."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepsmith.tasks.files import DataError, DataNotFound, notice, one_line, require_room
from stepsmith.tasks.image_files import (
    Split,
    decode_all,
    image_rows,
    labels_of,
    require_columns,
)

PROBE_SECONDS = 3.0  # how long to wait for the hub's first answer


class HubUnavailable(DataNotFound):
    """The hub, or the set on it, cannot be had here: ``source="auto"`` goes on to the sample."""


@dataclass(frozen=True)
class Known:
    """A set known by a short name: its repository, columns and commit on the hub, its classes."""

    hub_id: str
    image: str
    label: str
    classes: tuple[str, ...] | None  # None: only the files know
    revision: str | None  # None: the newest when it was first loaded here


_DIGITS = tuple("0123456789")
# fmt: off
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer",
            "dog", "frog", "horse", "ship", "truck")
# fmt: on
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
# fmt: off
KNOWN = {
    "mnist": Known(
        "ylecun/mnist", "image", "label", _DIGITS, "77f3279092a1c1579b2250db8eafed0ad422088c"
    ),
    "fashion_mnist": Known(
        "zalando-datasets/fashion_mnist", "image", "label", _FASHION,
        "531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2",
    ),
    "kmnist": Known("tanganke/kmnist", "image", "label", _KANA, None),
    "cifar10": Known(
        "uoft-cs/cifar10", "img", "label", _CIFAR10, "0b2714987fa478483af9968de7c934580d0bb9a2"
    ),
    "cifar100": Known(
        "uoft-cs/cifar100", "img", "fine_label", None, "aadb3af77e9048adbea6b47c21a81e47dd092ae5"
    ),
}
# fmt: on


def read_hub(name: str, revision: str | None = None) -> tuple[str, Split, Split]:
    """The origin, the training and the test split of a known set or of ``owner/name``.

    Args:
        name: the set.
        revision: its commit or branch; by default the known set's own.

    Raises:
        HubUnavailable: not installed, not reachable, or no such set.
        DataError: the set is no set of labelled images, or takes more memory than the limit.
    """
    if name not in KNOWN and "/" not in name:
        raise HubUnavailable(f"{name}: no hub set of this name is known; pass OWNER/NAME")
    spec = KNOWN.get(name)
    revision = revision or (spec.revision if spec else None)
    origin, train, test = hub_splits(name, spec.hub_id if spec else name, revision)
    import datasets
    from datasets import config
    from huggingface_hub import constants

    features = train.features
    image = spec.image if spec else _hub_column(features, datasets.Image)
    label = spec.label if spec else _hub_column(features, datasets.ClassLabel)
    if label is None and getattr(features.get("label"), "dtype", "").startswith(("int", "uint")):
        label = "label"
    if image not in features or label not in features:
        have = ", ".join(f"{k}: {type(v).__name__}" for k, v in features.items())
        raise DataError(
            f"{origin}: needs a column of type Image and one of type ClassLabel (or integers "
            f"called label), has {have}"
        )
    classes = getattr(features[label], "names", None)
    # Where `datasets` keeps what it fetched; a path in a set leads nowhere else.
    kept = [config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]

    def read(part: Any) -> Split:
        where = f"{origin} {part.split}"
        tables = part.with_format("arrow")  # encoded bytes: nothing is decoded here
        require_columns(where, part.data.schema, str(image), str(label))
        require_room(where, 8 * len(part), f"{len(part)} rows")
        labels = labels_of(where, tables.select_columns([label])[:][label], str(label))
        pictures = tables.select_columns([image])
        require_room(where, pictures.data.nbytes, f"column {image}")
        batches = (
            chunk
            for begin in range(0, len(part), 256)
            for chunk in pictures[begin : begin + 256][image].chunks
        )
        rows = image_rows(where, batches, [Path(place).expanduser() for place in kept])
        return decode_all(rows, len(labels), where), labels, classes

    return origin, read(train), read(test)


def hub_splits(name: str, hub_id: str, revision: str | None = None) -> tuple[str, Any, Any]:
    """The origin, the training and the test `datasets.Dataset` of a set of any kind on the hub.

    The origin ends in the commit that was loaded, where `datasets` tells it. A set without a
    revision is loaded from the newest commit once, and from that commit while it is kept here.

    Args:
        name: what the set was asked for as, for errors.
        hub_id: its repository, ``owner/name``.
        revision: its commit or branch, where that is not the main one.

    Raises:
        HubUnavailable: not installed, too old, not reachable, or no such set.
        DataError: the set has no training or no test split, or a folder stands in its place.
    """
    try:
        import datasets
    except ImportError:
        reason = "package datasets is not installed"
        raise HubUnavailable(f"{name}: {reason}; pip install datasets") from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        reason = f"package datasets {datasets.__version__} runs programs that come with a set"
        raise HubUnavailable(f"{name}: {reason}; pip install 'datasets>=4'")
    if Path(hub_id).exists():
        raise DataError(
            f"{name}: {Path(hub_id).absolute()} would be read in place of the hub's {hub_id}; work "
            "in another folder, or pass data_dir= to read this one"
        )
    splits = _prepared_before(f"{hub_id}@{revision}" if revision else hub_id)
    if splits is None:
        if reason := _hub_out_of_reach():
            raise HubUnavailable(f"{name}: {reason}; connect or use a directory")
        try:
            splits = datasets.load_dataset(hub_id, revision=revision)
        # What a hub, a proxy or a broken repository can raise is open-ended.
        except Exception as error:
            reason = f"hub set {hub_id} did not load ({one_line(error)})".replace(";", ",")
            raise HubUnavailable(f"{name}: {reason}; use a directory") from error
    test = next((s for s in ("test", "validation", "valid") if s in splits), None)
    origin = f"hub:{hub_id}"
    if "train" not in splits or test is None:
        raise DataError(f"{origin}: needs splits train and test (or validation), has {[*splits]}")
    commit = _commit(splits["train"])
    origin += f"@{commit}" if commit else ""
    if test != "test":
        notice(f"{origin}: no split called test, testing on {test}")
    return origin, splits["train"], splits[test]


def _commit(part: Any) -> str | None:
    """The commit that a split was prepared from: `datasets` names the folder after it."""
    folders = {Path(file["filename"]).parent.name for file in part.cache_files}
    commit = next(iter(folders)) if len(folders) == 1 else ""
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def _hub_column(features: Any, kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _prepared_before(hub_id: str) -> Any:
    """The set as `datasets` prepared it on this disk earlier, or None; asks no network.

    `load_dataset` finds it too, but where the network is down only after 20 seconds of retries.

    Args:
        hub_id: ``owner/name`` or ``owner/name@revision``; of a revision that is a commit nothing
            else will do.
    """
    hub_id, _, revision = hub_id.partition("@")
    try:
        from datasets.packaged_modules.cache.cache import Cache

        short = hub_id.split("/")[-1]
        splits = Cache(repo_id=hub_id, dataset_name=short, version="auto", hash="auto").as_dataset()
        is_commit = re.fullmatch("[0-9a-f]{40}", revision) is not None
        return splits if not is_commit or _commit(splits["train"]) == revision else None
    # Nothing there, several configurations, or another release of `datasets`: ask the hub.
    except Exception:
        return None


def _hub_out_of_reach() -> str | None:
    """Why the hub cannot be asked, or None where it answers within `PROBE_SECONDS`."""
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    off = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if off or constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    outcome = [f"no answer within {PROBE_SECONDS:g} s"]

    def probe() -> None:
        try:  # the hub client's own session, so with its proxies and certificates
            status = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code
            outcome[0] = f"status {status}" if status >= 500 else ""
        except Exception as error:
            outcome[0] = one_line(error).replace(";", ",")

    # In a thread, since looking up a host name obeys no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return f"hub {constants.ENDPOINT} not reachable ({outcome[0]})" if outcome[0] else None
