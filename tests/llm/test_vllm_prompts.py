"""What of the vLLM engine needs no vLLM: prompts as tokens, choices, probabilities."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from reasonembed.config import LLMConfig, SamplingConfig
from reasonembed.errors import ModelError
from reasonembed.llm.protocol import Request
from reasonembed.llm.vllm import _Renderer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% if not thinking | default(true) %}(no)"
    "{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte tokenizer that, like many, puts <s> before whatever it is given."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    path = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(path)
    return path


def renderer(folder, **changes):
    return _Renderer(str(folder), LLMConfig(model="tiny", **changes))


def request(prompt="Why?", *, prefill="", choices=()):
    return Request("r", prompt, SamplingConfig(), 1, prefill=prefill, choices=choices)


def text(made, prompt):
    return made.tokenizer.decode(prompt.token_ids)


def test_the_template_writes_the_only_start_token(folder):
    made = renderer(folder)
    assert made.tokenizer("x")["input_ids"][0] == 0  # the tokenizer adds one by itself
    prompt = made.prompt(request())
    assert text(made, prompt) == "<s>[user]Why?[bot]"
    assert prompt.token_ids.count(0) == 1
    assert prompt.error is None


def test_a_prefill_follows_the_generation_prompt(folder):
    made = renderer(folder)
    assert text(made, made.prompt(request(prefill="So"))) == "<s>[user]Why?[bot]So"


def test_template_arguments_are_passed_on(folder):
    made = renderer(folder, chat_template_kwargs={"thinking": False})
    assert text(made, made.prompt(request())) == "<s>[user]Why?[bot](no)"


def test_a_prompt_must_leave_room_for_a_token(folder):
    whole = len(renderer(folder).prompt(request()).token_ids)
    assert renderer(folder, max_model_len=whole + 1).prompt(request()).error is None
    refused = renderer(folder, max_model_len=whole).prompt(request())
    assert refused.error == f"the prompt has {whole} tokens, the context {whole}"


def test_a_choice_must_be_one_token(folder):
    made = renderer(folder)
    assert made.tokenizer.decode([made._choice_id("4")]) == "4"
    with pytest.raises(ModelError, match="'10' is 2 tokens of tiny, not one"):
        made._choice_id("10")


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(folder)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tiny has no chat template"):
        renderer(tmp_path)


@pytest.mark.parametrize("shift", [0.0, -900.0])  # e^-900 is 0 as a float
def test_choice_probabilities_are_normalised_over_the_choices(folder, shift):
    made = renderer(folder)
    asked = request(choices=("1", "2"))
    logprobs = {
        made._choice_id("1"): SimpleNamespace(logprob=-1.0 + shift),
        made._choice_id("2"): SimpleNamespace(logprob=-2.0 + shift),
    }
    answer = SimpleNamespace(text="1", finish_reason="length", token_ids=[5], logprobs=[logprobs])
    prompt = made.prompt(asked)
    done = made.completion(asked, prompt, SimpleNamespace(outputs=[answer], num_cached_tokens=32))
    # 1 / (1 + e^-1)
    assert done.choice_probabilities == pytest.approx({"1": 0.7310586, "2": 0.2689414})
    assert (done.prompt_tokens, done.completion_tokens) == (len(prompt.token_ids), 1)
    assert done.cached_tokens == 32


def test_a_completion_holds_what_the_engine_says(folder):
    made = renderer(folder)
    asked = request()
    answer = SimpleNamespace(text="hi", finish_reason=None, token_ids=[5, 6], logprobs=None)
    done = made.completion(
        asked, made.prompt(asked), SimpleNamespace(outputs=[answer], num_cached_tokens=None)
    )
    assert (done.text, done.finish_reason, done.completion_tokens) == ("hi", "stop", 2)
    assert (done.choice_probabilities, done.cached_tokens) == ({}, 0)
