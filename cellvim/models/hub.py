"""``from_pretrained`` and ``save_pretrained``: checkpoints in a local folder or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from cellvim.errors import ModelError
from cellvim.models.weights import load_checkpoint, save_checkpoint

try:
    from huggingface_hub import PyTorchModelHubMixin as _Mixin
except ImportError:  # the extra cellvim[hub] is not installed; local folders work without it

    class _Mixin:
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **_):
            """Load a checkpoint from a local folder."""
            return cls._from_pretrained(model_id=str(pretrained_model_name_or_path))

        def save_pretrained(self, save_directory: str | Path, **_) -> None:
            """Write ``model.safetensors`` into a local folder."""
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self._save_pretrained(Path(save_directory))


_FILE = "model.safetensors"


class HubModel(_Mixin):
    """Loads and saves one safetensors file that holds the configuration, from a folder or a hub repository."""

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(self, save_directory / _FILE, card=getattr(self, "card", None))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options):
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        handled = (
            *known,
            "config",
            "proxies",
            "resume_download",
            "map_location",
            "strict",
        )  # passed along by the hub's mixin
        if unknown := sorted(set(options) - set(handled)):
            raise ModelError(
                f"from_pretrained does not take {', '.join(unknown)}: a checkpoint's configuration is its own."
            )
        if (Path(model_id) / _FILE).is_file():
            return load_checkpoint(Path(model_id) / _FILE)
        if Path(model_id).is_dir():
            raise ModelError(f"The folder {model_id} has no {_FILE}.")
        try:
            from huggingface_hub import hf_hub_download
        except ImportError as error:
            raise ModelError(
                f"{model_id} is no local folder, and loading from the hub needs: pip install 'cellvim[hub]'."
            ) from error
        options = {k: v for k, v in options.items() if k in known}
        try:
            file = hf_hub_download(model_id, _FILE, **options)
        except Exception as error:  # the hub client raises many kinds: no network, no repository, no access
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{model_id} is no local folder and could not be had from the hub: {reason}") from error
        return load_checkpoint(file)
