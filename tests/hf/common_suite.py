"""transformers' own common tests on HopeForCausalLM: `test_transformers_suite.py` runs them.

It puts this file where its relative imports mean transformers' tests.
"""

import unittest

import torch
from transformers.testing_utils import require_torch, torch_device

from nestlearn import Level
from nestlearn import state as tree
from nestlearn.hf import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.options import Continuum, Titans

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor
from ...test_pipeline_mixin import PipelineTesterMixin
from ...test_training_mixin import TrainingTesterMixin

CHECKPOINTS = "it looks for transformers' class of layers: a Hope computes its chunks again"
REFUSED = "a file without weights is refused, where transformers would start them at random"


class HopeTester:
    """A tiny model of each kind, and ids."""

    causal_lm_class = HopeForCausalLM
    base_model_class = None
    training_overfit_steps = 80
    batch_size, seq_length, is_training, vocab_size = 5, 18, True, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    bos_token_id = eos_token_id = pad_token_id = 98

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        torch.manual_seed(0)
        return HopeConfig(
            vocab_size=self.vocab_size, dim=self.hidden_size, layers=2, heads=2, mixer=Titans(8),
            channel=Continuum((Level(chunk=4), Level(chunk=8), Level())),
            bos_token_id=self.bos_token_id, eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        }

    def prepare_config_and_inputs(self):
        config, inputs = self.prepare_config_and_inputs_for_common()
        return (config, inputs["input_ids"], None, None, None, None)


@require_torch
class HopeModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (HopeForCausalLM,)
    has_attentions = False
    test_missing_keys = False  # as Mamba2
    pipeline_model_mapping = {"text-generation": HopeForCausalLM}  # noqa: RUF012

    def setUp(self):
        self.model_tester = HopeTester(self)
        self.config_tester = ConfigTester(
            self, config_class=HopeConfig, has_text_modality=True, dim=32,
            common_properties=[
                "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
            ],
        )  # fmt: skip

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """With labels, which transformers adds for the classes of its own tables only."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            shape = (self.model_tester.batch_size, self.model_tester.seq_length)
            inputs["labels"] = torch.zeros(shape, dtype=torch.long, device=torch_device)
        return inputs

    def _check_caches_are_equal(self, cache1, cache2):
        """Row by row, as each class of a state without keys and values says it itself."""
        assert isinstance(cache1, HopeCache)
        assert cache1.batch_size == cache2.batch_size
        for row in range(cache1.batch_size):
            pairs = zip(
                tree.leaves(cache1.select([row]).state),
                tree.leaves(cache2.select([row]).state),
                strict=True,
            )
            for (_, a), (_, b) in pairs:
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    @unittest.skip(CHECKPOINTS)
    def test_gradient_checkpointing_enable_disable(self):
        pass

    @unittest.skip(CHECKPOINTS)
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip(CHECKPOINTS)
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass

    @unittest.skip(CHECKPOINTS)
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass

    @unittest.skip(REFUSED)
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass

    @unittest.skip("as Mamba2: it needs a large model")
    def test_multi_gpu_data_parallel_forward(self):
        pass
