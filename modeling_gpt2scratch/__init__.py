"""GPT-2 from scratch as a transformers model: importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_gpt2scratch import PRESETS, GPT2ScratchConfig
from .modeling_gpt2scratch import GPT2ScratchForCausalLM, GPT2ScratchModel, GPT2ScratchPreTrainedModel

AutoConfig.register("gpt2scratch", GPT2ScratchConfig)
AutoModel.register(GPT2ScratchConfig, GPT2ScratchModel)
AutoModelForCausalLM.register(GPT2ScratchConfig, GPT2ScratchForCausalLM)

# So that save_pretrained and push_to_hub send the code along with the weights.
GPT2ScratchConfig.register_for_auto_class()
GPT2ScratchModel.register_for_auto_class("AutoModel")
GPT2ScratchForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PRESETS", "GPT2ScratchConfig", "GPT2ScratchForCausalLM", "GPT2ScratchModel", "GPT2ScratchPreTrainedModel"]
