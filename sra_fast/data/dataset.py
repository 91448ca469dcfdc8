"""The configured data set, checked against the model and the batch."""

from sra_fast.config.schema import Config, DataConfig
from sra_fast.data.latents import open_latents
from sra_fast.data.training_data import TrainingData
from sra_fast.utils.registry import DATASETS


@DATASETS.register("latents")
def make_latents(data: DataConfig) -> TrainingData:
    """VAE moments on disk."""
    return open_latents(data.path, data.latent_scale, data.verify)


def make_dataset(cfg: Config) -> TrainingData:
    """The configured training set; ValueError if it does not fit the model or the batch."""
    data = DATASETS[cfg.data.name](cfg.data)
    model = cfg.model
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ValueError(
            f"the model takes latents {expected} (in_channels, input_size), "
            f"the data has {data.shape}"
        )
    smallest = int(data.labels.min())
    if smallest < 0 or data.num_classes > model.num_classes:
        raise ValueError(
            f"labels must lie in [0, {model.num_classes}) (model.num_classes), "
            f"the data has {smallest} .. {data.num_classes - 1}"
        )
    if len(data) < cfg.train.global_batch:
        raise ValueError(
            f"train.global_batch {cfg.train.global_batch} is larger than the data set "
            f"({len(data)} images)"
        )
    return data
