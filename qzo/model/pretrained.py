"""transformers' from_pretrained and save_pretrained for checkpoints that qzo reads: QuantLinears in, an ordinary checkpoint out.

transformers reads what is not quantized. A quantized Linear has no parameter while it does, and is replaced afterwards by what
`swap_quantized` reads from the same folder.
"""

from pathlib import Path
from typing import Any

import torch
from qzo_kernels.pack import untile_codes
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.formats import format_of, is_quantized, read_config
from qzo.model.linear import QuantLinear
from qzo.model.packed_format import PackedConfig, prepare_model
from qzo.model.uniform import Moved


class CheckpointConfig(QuantizationConfigMixin):
    """config.json's quantization_config as it stands there, whatever the format: saved again, it says the same."""

    def __init__(self, **raw: Any):
        self.__dict__.update(raw)


class CheckpointQuantizer(HfQuantizer):
    """What transformers calls while it reads or writes a checkpoint of a format in qzo.model.formats.

    Raises BadInput for a format that is not understood (a newer one), a tensor that is missing (transformers would
    draw random weights for it), a model spread over devices, and a 16-bit model to be quantized on the way.
    """

    path: Path | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise BadInput("from_pretrained, quantization_config", "a model of 16 bits to quantize", "a quantized checkpoint",
                           "Quantize it first: qzo quantize MODEL -o OUT.")  # fmt: skip

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        if not checkpoint_files:
            raise BadInput("from_pretrained", "a state_dict", "a folder or a hub id", "Tensors in memory cannot be read as a checkpoint.")
        self.path = Path(checkpoint_files[0]).parent
        folder = Folder(self.path)
        config = read_config(folder)
        if config is None:
            raise BadInput("from_pretrained", f"{folder.path}, a latent checkpoint of ZeroQAT", "a quantized checkpoint",
                           "Load it with qzo.load_model(FOLDER).model, or pack it: qzo export FOLDER -o OUT.")  # fmt: skip
        if isinstance(config, PackedConfig):
            prepare_model(model, folder, config)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and is_quantized(folder, name, config):
                module.weight = module.bias = None
        tied = getattr(model, "all_tied_weights_keys", {})
        for name, _ in model.named_parameters():
            if name not in folder and name not in tied:
                raise BadInput(str(self.path), f"no tensor {name}", "every tensor of the model",
                               "The checkpoint is incomplete or newer than this qzo, or the model has another head than it.")  # fmt: skip
        parts = "|".join([*format_of(config).PARTS, "bias"])
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"\.({parts})$"}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from qzo.model.load import swap_quantized

        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or torch.device("meta") in devices:
            raise BadInput("from_pretrained, device_map", ", ".join(sorted(map(str, devices))), "one device for the whole model")
        folder = Folder(self.path)
        swap_quantized(model, folder, read_config(folder), devices.pop(), model.dtype)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of an ordinary checkpoint: scales rounded to its dtype, everything that does not move as it was read."""
        folder = Folder(self.path)
        config = read_config(folder)
        layout, state = format_of(config), model.state_dict()
        for name, layer in model.named_modules():
            if not isinstance(layer, QuantLinear):
                continue
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.") or key == f"{name}.bias"}
            codes = None if config.codebook else untile_codes(layer.codes, layer.bits, layer.in_features).to("cpu", torch.uint8)
            moved = Moved(layout.rounded(folder, name, layer.scales.detach().cpu()), codes)
            parts = {part: layout.written(folder, name, part, config, config.version, moved) for part in layout.PARTS if f"{name}.{part}" in folder}
            state |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
        for stored in folder.tensors:  # embeddings that were kept in host memory, biases of zeros
            if stored not in state and f"model.{stored}" not in state:
                state[stored] = folder.read(stored)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def attach(model: nn.Module, folder: Folder) -> None:
    """Let `save_pretrained` of a model that `load_model` read from `folder` write a checkpoint of the folder's format."""
    raw = folder.config.get("quantization_config") or folder.read_json("quantize_config.json")
    model.config.quantization_config = CheckpointConfig(**{"quant_method": "gptq", **raw})
    model.hf_quantizer = CheckpointQuantizer(model.config.quantization_config)
    model.hf_quantizer.path = folder.path
