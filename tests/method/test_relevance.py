"""Similarity to the question, in the embeddings of the language model or of CLIP's text tower (CDPruner, MMTok)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel
from transformers.integrations.neftune import neftune_post_forward_hook

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.batch import QUESTION_PADDING
from dualspeed.data.collator import ConversationCollator, generation_inputs
from dualspeed.data.questions import text_of_user, tokenize_questions
from dualspeed.method.fast_mode import encode_batch, observe_pruning, prune_batch
from dualspeed.method.keywords import KeywordTokenizer, keywords
from dualspeed.method.relevance import ClipRelevance, mean_similarity, similarity_by_llm
from dualspeed.method.sequences import Sequences
from dualspeed.method.vlm.vision import encode_images
from dualspeed.settings.identity import identity, record
from dualspeed.settings.names import TEXT_PRUNERS
from tests.support import tiny
from tests.support.batches import IMAGE_TOKEN, collate, sample
from tests.support.word_tokenizer import word_tokenizer

POSITIONS = 10
SHORT, LONG = "what colour is the digit ?", " ".join(["is there a red 1 2 3 or a blue ?"] * 3)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Random CLIP with the vision tower of tests/support/tiny.py and a text tower of ten positions."""
    folder = tmp_path_factory.mktemp("clip")
    words = [*dict.fromkeys(tiny.WORDS), "<unk>", "<begin>", "<end>"]
    named = {"unk_token": "<unk>", "bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<end>"}
    word_tokenizer(words, special_tokens=named).save_pretrained(folder)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(words), "max_position_embeddings": POSITIONS}
    text |= {"bos_token_id": words.index("<begin>"), "eos_token_id": words.index("<end>")}
    vision = tiny.configs()["vision_config"].to_dict()
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    tiny.spread(clip).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    noise = np.random.default_rng(0).integers(0, 255, (28, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def conversation(picture: Path, question: str, answer: str = "red", images: int = 1) -> dict:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return {"id": question, "messages": messages, "images": [picture] * images}


def model_of(clip_folder, make=tiny.llava, **settings) -> DualSpeedModel:
    chosen = {"pruner": "cdpruner", "pruning_ratio": 0.5, "relevance_clip": str(clip_folder)} | settings
    torch.manual_seed(0)
    return DualSpeedModel(make(), DualSpeedConfig(**chosen))


def test_clip_similarity_equals_its_literal_form(clip_folder):
    """Equal to a loop over texts, pieces and patches, for texts of any length, alone or in a batch."""
    relevance, clip = ClipRelevance(clip_folder, tiny.llava()), CLIPModel.from_pretrained(clip_folder)
    texts = [SHORT, LONG, "", "red " * 8]
    samples = torch.tensor([0, 0, 1, 1, 2, 3])
    patches = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    ours = relevance(tokenize_questions(texts, relevance.tokenizer), patches, samples)

    begin, end = relevance.tokenizer.bos_token_id, relevance.tokenizer.eos_token_id
    for patch, text, score in zip(patches, [texts[index] for index in samples], ours, strict=True):
        words = relevance.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [words[start : start + POSITIONS - 2] for start in range(0, max(1, len(words)), POSITIONS - 2)]
        image = clip.visual_projection(clip.vision_model.post_layernorm(patch))
        cosines = [
            cosine_similarity(image, clip.get_text_features(torch.tensor([[begin, *piece, end]])).pooler_output[0], 0)
            for piece in pieces
        ]
        beyond = torch.full((len(score) - len(cosines),), -torch.inf)
        assert_close(score, torch.cat([-torch.stack(cosines), beyond]), atol=1e-5, rtol=1e-5)
        assert_close(mean_similarity(score), -torch.stack(cosines).mean(), atol=1e-5, rtol=1e-5)
    assert len(relevance.tokenizer(LONG)["input_ids"]) > 2 * POSITIONS
    alone = relevance(tokenize_questions([SHORT], relevance.tokenizer), patches[:2], samples[:2])
    assert_close(alone[:, 0], ours[:2, 0], atol=1e-6, rtol=1e-6)
    assert ours.shape[1] > alone.shape[1] == 1


def test_patches_are_those_that_clip_itself_would_project(clip_folder):
    """The patches are those of the layer that the model selects."""
    vlm = tiny.llava()
    model = model_of(clip_folder, lambda: vlm)
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    patches = encode_batch(model, pixels).described["pre_projection"]
    states = vlm.model.vision_tower(**pixels, output_hidden_states=True).hidden_states[-2]
    assert_close(patches, states[:, 1:].flatten(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "processor"), [(tiny.llava, tiny.llava_processor), (tiny.llava_next, tiny.llava_next_processor)]
)
@pytest.mark.parametrize("by_clip", [True, False])
@pytest.mark.parametrize("pruner", TEXT_PRUNERS)
def test_what_is_kept_follows_the_users_words_alone(clip_folder, picture, make, processor, by_clip, pruner):
    """Another question keeps other tokens; another answer and other batch mates keep the same."""
    processor = processor()
    model = model_of(clip_folder, make, pruner=pruner, **({} if by_clip else {"relevance_clip": None}))
    collate_ = ConversationCollator(processor, question_tokenizer=model.question_tokenizer(processor))

    def kept(*conversations: dict) -> torch.Tensor:
        """Kept features of all images, isolator included."""
        batch = collate_(conversations)
        whole = Sequences(*(batch[name] for name in ("input_ids", "attention_mask", "labels")))
        pixels = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
        _, output = prune_batch(
            model, whole._replace(question_ids=batch["question_ids"]), encode_batch(model, pixels), None
        )
        return torch.cat(list(output.pooler_output)) if isinstance(output.pooler_output, list) else output.pooler_output

    one = conversation(picture, SHORT)
    alone = kept(one)
    other_answer = one | {"messages": [one["messages"][0], *conversation(picture, SHORT, "blue blue")["messages"][1:]]}
    assert_close(kept(other_answer), alone)
    assert_close(kept(one, conversation(picture, LONG))[: len(alone)], alone, atol=1e-5, rtol=1e-5)
    other_question = one | {"messages": [*conversation(picture, "3 blue how many no")["messages"]]}
    assert not torch.equal(kept(other_question), alone)


def test_question_is_what_the_user_says(picture):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "USER"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "how many"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
    ]
    assert text_of_user(messages) == "what colour\nhow many"
    processor = tiny.llava_processor()
    rows = [conversation(picture, "digit") | {"messages": messages[1:]}, conversation(picture, "digit")]
    batch = ConversationCollator(processor, question_tokenizer=processor.tokenizer)(rows)
    words = processor.tokenizer.convert_tokens_to_ids(["what", "colour", "how", "many", "digit"])
    assert batch["question_ids"].tolist() == [
        words[:4],
        [words[4], QUESTION_PADDING, QUESTION_PADDING, QUESTION_PADDING],
    ]
    questions = [{"image": None, "prompt": "how many"}]
    asked = generation_inputs(processor, questions, question_tokenizer=processor.tokenizer)
    assert asked["question_ids"].tolist() == [words[2:4]]
    assert "question_ids" not in ConversationCollator(processor)(rows)


def test_llm_similarity_is_that_to_each_token_of_the_question_or_the_prompt():
    """Answers, images and padding have no influence; with a question nothing else has."""
    vlm = tiny.llava()
    samples = [sample("llava", seed, 1) for seed in range(2)]
    batch = collate([samples[0], sample("llava", 5, 0), samples[1]])
    features = torch.cat(encode_images(vlm, {"pixel_values": batch["pixel_values"]}).features)
    inputs = Sequences(batch["input_ids"], batch["attention_mask"], batch["labels"])
    prompts = [
        [word for word, label in zip(one["ids"], one["labels"], strict=True) if label == -100 and word != IMAGE_TOKEN]
        for one in samples
    ]
    asked = torch.tensor([[7, 8, 9], [5, QUESTION_PADDING, QUESTION_PADDING], [6, 7, QUESTION_PADDING]])
    for words, given in ((prompts, inputs), ([[7, 8, 9], [6, 7]], inputs._replace(question_ids=asked))):
        ours = similarity_by_llm(given, features, vlm.get_input_embeddings(), IMAGE_TOKEN)
        for row, vectors, scores in zip(words, features.split(16), ours.split(16), strict=True):
            embeddings = vlm.get_input_embeddings()(torch.tensor(row))
            similarity = cosine_similarity(vectors[:, None], embeddings[None], dim=-1)
            assert_close(scores[scores > -torch.inf].view(16, -1), similarity, atol=1e-5, rtol=1e-5)
            assert_close(mean_similarity(scores), similarity.mean(dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pruner", ["cdpruner", "mmtok"])
def test_neftunes_noise_is_in_the_sequence_but_not_in_the_similarity(pruner):
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(pruner=pruner, pruning_ratio=0.7)).train()
    batch = collate([sample("llava", seed, 1) for seed in range(2)])
    embed, seen, losses = model.vlm.get_input_embeddings(), [], []

    def observe(run, tokens):
        seen.append(tokens.text_similarity if pruner == "mmtok" else tokens.relevance)
        return run()

    for alpha in (0.0, 5.0):
        embed.neftune_noise_alpha = alpha
        handle = embed.register_forward_hook(neftune_post_forward_hook)
        with observe_pruning(model, observe):
            losses.append(model(**batch, mode=Mode.FAST).loss.item())
        handle.remove()
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert torch.equal(*seen)
    assert embed.training


def test_an_image_without_text_has_no_relevance():
    assert mean_similarity(torch.full((2, 3), -torch.inf)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is there a red digit?", "there red digit"),
        ("What is the WHAT?\nHow many dogs", "many dogs"),
        ("a dog\nAnswer the question using a single word or phrase.", "dog"),
        ("What is it?\nAnswer the question using a single word or phrase.", "What is it?"),
        ("", ""),
    ],
)
def test_keywords_leave_out_stop_words_unless_there_are_no_others(text, expected):
    assert keywords(text) == expected


def test_mmtok_reads_the_keywords_in_training_and_in_generation(picture):
    """Its question_ids hold the keywords' tokens alone, by the language model's tokenizer or by CLIP's."""
    processor = tiny.llava_processor()
    tokenizer = DualSpeedModel(tiny.llava(), DualSpeedConfig(pruner="mmtok")).question_tokenizer(processor)
    assert isinstance(tokenizer, KeywordTokenizer)
    words = processor.tokenizer.convert_tokens_to_ids(["there", "red", "digit"])
    trained = ConversationCollator(processor, question_tokenizer=tokenizer)(
        [conversation(picture, "is there a red digit")]
    )
    asked = generation_inputs(processor, [{"image": picture, "prompt": "is there a red digit"}], "left", tokenizer)
    assert trained["question_ids"].tolist() == asked["question_ids"].tolist() == [words]


def test_both_modes_train_and_nothing_of_clip_is_saved(clip_folder, picture, tmp_path):
    model, processor = model_of(clip_folder), tiny.llava_processor()
    assert not [name for name in model.state_dict() if "clip" in name]
    tokenizer = model.question_tokenizer(processor)
    batch = ConversationCollator(processor, question_tokenizer=tokenizer)(
        [conversation(picture, SHORT), conversation(picture, LONG)]
    )
    for mode in Mode:
        model(mode=mode, **batch).loss.backward()
    assert model.mode_isolator.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "dualspeed.json").read_text())["relevance_clip"] == str(clip_folder)
    again = DualSpeedModel.from_pretrained(tmp_path).eval()
    assert_close(again(mode=Mode.FAST, **batch).loss, model(mode=Mode.FAST, **batch).loss)
    asked = generation_inputs(processor, [{"image": picture, "prompt": SHORT}], "left", tokenizer)
    for mode in Mode:
        generated = model.generate(mode=mode, max_new_tokens=2, do_sample=False, **asked)
        assert generated.shape[1] > asked["input_ids"].shape[1]


def test_what_is_missing_or_unfit_is_named(clip_folder, picture):
    processor = tiny.llava_processor()
    with pytest.raises(ValueError, match=r"relevance_clip needs question_ids: give ConversationCollator"):
        model_of(clip_folder)(mode=Mode.FAST, **ConversationCollator(processor)([conversation(picture, SHORT)]))
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration with a siglip_vision_model of width 32"):
        model_of(clip_folder, tiny.llava_siglip)
    assert model_of(clip_folder, pruner="divprune").question_tokenizer(processor) is None


def test_settings_without_clip_are_as_they_were_before_there_was_the_choice(clip_folder):
    assert "relevance_clip" not in identity(DualSpeedConfig())
    chosen = DualSpeedConfig(pruner="cdpruner", relevance_clip=str(clip_folder))
    assert DualSpeedConfig(**record(chosen)) == chosen
