"""Mixin of a Trainer that keeps what a frozen vision tower makes of the images, and encodes each of them once.

Before the first batch of a dataset is drawn, the images that the folder lacks are encoded, one by one, so that an
image's outputs don't depend on its neighbours; the processes share the work. From then on all steps read, those of the
first epoch like those of the last one: workers of the data loader put the outputs into the batches, so that no step
waits for them, and all ranks call the same modules.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from dualspeed.data.collator import ConversationCollator, record_of
from dualspeed.data.image_digest import image_digest
from dualspeed.data.images import ImageSource
from dualspeed.errors import ConfigError, FeatureCacheError, ModelError
from dualspeed.files import sha256_of_json
from dualspeed.method.host_counts import HOST_INPUTS
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.vlm.encoder import accepted_inputs
from dualspeed.method.vlm.evaluation_mode import evaluation_mode
from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.inputs import blank_image
from dualspeed.method.vlm.parts import parameter_parts
from dualspeed.method.vlm.tower_states import TowerStates, attention_fields, check_keepable, states_of_images
from dualspeed.method.vlm.vision import encode_images
from dualspeed.training.feature_address import address_of
from dualspeed.training.feature_folder import (
    check_space,
    file_of,
    open_folder,
    read_states,
    remove_leftovers,
    write_states,
)
from dualspeed.training.random_state import kept_random_state

logger = logging.getLogger(__name__)
PROBES = 4
"""Images that are encoded before the space for all others is estimated from theirs."""
ROWS_AT_ONCE = 64
"""Rows of a dataset that a worker reads at once, for the digests of their images."""
IMAGES_AT_ONCE = 4
"""Images that a worker hands over at once; each is encoded by itself."""
Place = tuple[int, int]
"""Row of a dataset, and image of that row."""

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


@dataclass(frozen=True)
class StoredStates:
    """Function of a batch's images that reads their outputs from the folder of an address."""

    folder: Path

    def __call__(self, images: Sequence[ImageSource]) -> TowerStates:
        """Return the outputs in the order of the images."""
        return TowerStates.joined([read_states(self.folder, image_digest(image)) for image in images])


class StoresFeatures(Base):
    """Mixin of a Trainer whose model is a DualSpeedModel and whose `cache_features` may name a folder."""

    cache_features: str | None
    """Folder; None: the tower runs in every step."""
    _feature_store: "FeatureStore | None" = None
    _stored_datasets: tuple[Any, ...] = ()

    def get_train_dataloader(self) -> DataLoader:
        """Stock data loader, behind the encoding of what the folder lacks, also of the images to validate on."""
        self._store_features(self.train_dataset, self.eval_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Stock data loader, behind the encoding of what the folder lacks."""
        self._store_features(
            self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        )
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Stock data loader, behind the encoding of what the folder lacks."""
        self._store_features(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _store_features(self, *datasets: Any) -> None:
        """Encode the images of these datasets that the folder lacks, and let the collator read from it."""
        if self.cache_features is None:
            return
        parts = [part for one in datasets for part in (one.values() if isinstance(one, dict) else [one])]
        new = [part for part in parts if part is not None and not any(part is done for done in self._stored_datasets)]
        if not new:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        check_cached_training(self, model, new)
        with kept_random_state(self.args.device):
            self._feature_store = self._feature_store or FeatureStore(self, model)
            for dataset in new:
                self._feature_store.fill(dataset)
        self._stored_datasets += tuple(new)
        self.data_collator.tower_states = StoredStates(self._feature_store.folder)


def check_cached_training(trainer: StoresFeatures, model: DualSpeedModel, datasets: Sequence[Any]) -> None:
    """Raise ConfigError or ModelError for a training whose steps can't read kept features."""
    collator, parts = trainer.data_collator, parameter_parts(model.vlm)
    if any(parameter.requires_grad and part == "vision" for parameter, part in parts.items()):
        raise ConfigError("cache_features: the vision tower is trained, so that its features change; valid: null")
    if model.dualspeed.pixel_pruning is not None:
        raise ConfigError("cache_features: with pixel_pruning other pixels enter the tower in each mode; valid: null")
    if trainer.is_deepspeed_enabled:
        raise ConfigError("cache_features: DeepSpeed casts and shares the tower itself; valid: null, or DDP or FSDP2")
    if not isinstance(collator, ConversationCollator):
        raise ConfigError(
            f"cache_features: {type(collator).__name__} doesn't say which images are in a batch; valid: null, or a "
            "ConversationCollator"
        )
    if any(not hasattr(dataset, "__len__") for dataset in datasets):
        raise ConfigError("cache_features: the images of a stream aren't known before training; valid: null")
    check_keepable(model.vlm)


class FeatureStore:
    """Encoding of what a folder lacks, by all processes of a training."""

    def __init__(self, trainer: StoresFeatures, model: DualSpeedModel) -> None:
        self.args, self.accelerator = trainer.args, trainer.accelerator
        self.collator, self.vlm = trainer.data_collator, model.vlm
        self.fields = attention_fields(self.vlm, {*model.pruner.needs, *model.pruner.optional})
        self.root = Path(trainer.cache_features or "")
        self.is_checked = False
        address = address_of(self.vlm, self.collator.processor, self.fields, self.accelerator.mixed_precision)
        # Under FSDP only the first process of a machine may have loaded the weights.
        addresses = gather_object([sha256_of_json(address)])
        self.ranks = [rank for rank, other in enumerate(addresses) if other == addresses[0]]
        found = [open_folder(self.root, address) if self.accelerator.is_main_process else None]
        self.folder = broadcast_object_list(found)[0]

    def fill(self, dataset: Any) -> None:
        """Encode the images of a dataset that the folder lacks; other trainings wait, and then find them there."""
        with FileLock(self.folder / ".lock") if self.accelerator.is_main_process else nullcontext():
            if self.accelerator.is_main_process:  # which has the lock, so that nobody is writing
                remove_leftovers(self.folder)
            self.accelerator.wait_for_everyone()
            places = self._places(dataset)
            missing = sorted(digest for digest in places if not file_of(self.folder, digest).exists())
            self.accelerator.wait_for_everyone()  # all have looked before one writes
            rank = self.accelerator.process_index
            if missing and rank in self.ranks:
                number, of = self.ranks.index(rank), len(self.ranks)
                self._encode(dataset, {digest: places[digest] for digest in missing[number::of]}, len(missing))
            self.accelerator.wait_for_everyone()
        logger.info("%s: %d images encoded, %d were there", self.folder, len(missing), len(places) - len(missing))
        if missing and not file_of(self.folder, missing[0]).exists():
            raise FeatureCacheError(
                f"cache_features: {self.root} isn't the same folder on all nodes; valid: a shared one"
            )

    def _places(self, dataset: Any) -> dict[str, Place]:
        """Digest of each image of a dataset -> a place of it; every process reads a part of the rows."""
        rows = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        loader = self._loader(DigestsOfRows(dataset, rows), ROWS_AT_ONCE)
        parts = tqdm(loader, "Looking for kept features", leave=False, disable=None)
        found = [pair for part in parts for pairs_of_row in part for pair in pairs_of_row]
        return dict(gather_object(found) if self.accelerator.num_processes > 1 else found)

    def _encode(self, dataset: Any, places: dict[str, Place], num_missing: int) -> None:
        """Encode and write this process's share of the missing images."""
        if any(isinstance(parameter, DTensor) for parameter in self.vlm.parameters()):
            raise ConfigError(
                "cache_features: the model is shared by now, and the dataset has images that weren't encoded before "
                "training; valid: one that the trainer was made with"
            )
        loader = self._loader(ImagesOfPlaces(dataset, list(places.items()), self.collator), IMAGES_AT_ONCE)
        pairs = (pair for part in tqdm(loader, "Encoding images", leave=False, disable=None) for pair in part)
        num_bytes = 0
        with tower_on(self.vlm, self.args.device), evaluation_mode(self.vlm), self.accelerator.autocast():
            if not self.is_checked:
                check_alike(self.vlm, self.fields)
                self.is_checked = True
            for number, (digest, batch) in enumerate(pairs, 1):
                inputs = self._inputs(batch)
                num_bytes += write_states(self.folder, digest, states_of_images(self.vlm, inputs, self.fields))
                if number == PROBES:
                    left = num_missing - PROBES * len(self.ranks)
                    check_space(self.folder, num_bytes / number * left, left)

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the tower in a collated batch, on the device."""
        accepted = set(accepted_inputs(self.vlm)) - set(family_of(self.vlm).refused_inputs)
        return {
            name: values if name in HOST_INPUTS else values.to(self.args.device)
            for name, values in batch.items()
            if name in accepted
        }

    def _loader(self, dataset: Dataset, batch_size: int) -> DataLoader:
        """Loader with the training's number of workers, whose items are lists as they are."""
        return DataLoader(dataset, batch_size, num_workers=self.args.dataloader_num_workers, collate_fn=list)


@dataclass
class DigestsOfRows(Dataset):
    """Digests of the images of some rows of a dataset: item i is [(digest, place), ...] of the i-th of these rows."""

    dataset: Any
    rows: Sequence[int]

    def __post_init__(self) -> None:
        self._of_path: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[tuple[str, Place]]:
        row = self.rows[index]
        images = record_of(self.dataset[row], row + 1)["images"]
        return [(self._digest(image), (row, place)) for place, image in enumerate(images)]

    def _digest(self, image: ImageSource) -> str:
        """Digest, read once of a file that many rows show."""
        if not isinstance(image, str):
            return image_digest(image)
        if image not in self._of_path:
            self._of_path[image] = image_digest(image)
        return self._of_path[image]


@dataclass
class ImagesOfPlaces(Dataset):
    """Collated batches with one image each: item i is (digest, batch)."""

    dataset: Any
    places: Sequence[tuple[str, Place]]
    collator: ConversationCollator

    def __post_init__(self) -> None:
        self.collator = copy.copy(self.collator)  # alone, since what a pass over one image needs is little
        self.collator.tower_states = self.collator.positions = self.collator.question_tokenizer = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Tensor]]:
        digest, (row, place) = self.places[index]
        return digest, self.collator([with_one_image(record_of(self.dataset[row], row + 1), place)])


def with_one_image(record: dict[str, Any], place: int) -> dict[str, Any]:
    """Copy of a record that shows only one of its images."""
    numbers = iter(range(len(record["images"])))
    messages = [
        {
            **message,
            "content": [item for item in message["content"] if item["type"] != "image" or next(numbers) == place],
        }
        for message in record["messages"]
    ]
    return {**record, "messages": messages, "images": [record["images"][place]]}


def check_alike(vlm: PreTrainedModel, fields: Sequence[str]) -> None:
    """Raise ModelError unless an image's features are the same with its kept outputs in the place of the layers."""
    images = blank_image(vlm)
    noise = torch.rand(images["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    images |= {"pixel_values": noise.to(images["pixel_values"])}
    with torch.no_grad():
        states = TowerStates.joined([states_of_images(vlm, images, fields)])
        run, read = (encode_images(vlm, images, fields, states=given) for given in (None, states))
    values = [[*one.all_features(), *(one.described[name] for name in fields)] for one in (run, read)]
    if not all(torch.equal(one, other) for one, other in zip(*values, strict=True)):
        raise ModelError(
            f"cache_features: {type(vlm).__name__} has other features when its tower's outputs are read; valid: null"
        )


@contextmanager
def tower_on(vlm: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Hold tower and projector on a device while the context is open; under FSDP the model comes there later."""
    family = family_of(vlm)
    paths = [family.tower, *family.further_towers, *family.projector]
    with ExitStack() as moved, torch.no_grad():
        for value in (attrgetter(path)(vlm) for path in paths):
            tensors = [value] if isinstance(value, Tensor) else [*value.parameters(), *value.buffers()]
            for tensor in tensors:
                if tensor.device != device:
                    moved.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.to(device)
        yield
