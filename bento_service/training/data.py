"""A job's data for a recipe: the rows to train on and those to evaluate on."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from bento_service.errors import InvalidDataset
from bento_service.training.preferences import load_rows, require_valid
from bento_service.training.row_bounds import UNBOUNDED
from bento_service.training.run_directory import RunDirectory
from bento_service.training.spec import TrainingSpec


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    train: Dataset
    evaluation: Dataset | None
    conversational: bool  # whether rows are messages, which need a chat template


def read_data(spec: TrainingSpec, run: RunDirectory) -> TrainingData:
    """The rows of a job's files in TRL's form, kept on disk under the run's cache.

    Raises InvalidDataset when a row cannot be trained on.
    """
    options = spec.options.evaluation
    train, conversational = read_rows(Path(spec.training_file), "training_file", spec, run)
    evaluation = None
    if spec.validation_file is not None:
        evaluation, messages = read_rows(Path(spec.validation_file), "validation_file", spec, run)
        conversational = conversational or messages
    elif options.split > 0:
        train, evaluation = hold_out(train, options.split, spec.seed)
    if evaluation is not None and options.max_steps is not None:
        most = options.max_steps * (options.batch_size or spec.batch_size)
        evaluation = evaluation.select(range(min(len(evaluation), most)))
    return TrainingData(train=train, evaluation=evaluation, conversational=conversational)


def read_rows(file: Path, param: str, spec: TrainingSpec, run: RunDirectory) -> tuple[Dataset, bool]:
    """The rows of one file, and whether they are messages."""
    # Its bounds were checked when the job was submitted.
    require_valid(file, param, bounds=UNBOUNDED, method=spec.method)
    dataset = Dataset.from_generator(load_rows, gen_kwargs={"path": file}, cache_dir=str(run.cache))
    return dataset, any(isinstance(value, list) for value in dataset[0].values())


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a fraction of the rows, at least one, for evaluation; the split depends on the seed only."""
    if len(dataset) < 2:
        raise InvalidDataset(
            "evaluation.split needs at least 2 rows, training_file has 1: add rows or set split to 0",
            param="training_file",
        )
    held_out = min(max(1, round(fraction * len(dataset))), len(dataset) - 1)
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]
