"""The Hugging Face classifier as a scorer, on tiny RoBERTa models that are trained here and really classify."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    pipeline,
)

from safety_lens.errors import DataError, ModelError
from safety_lens.interventions.scorers import ClassifierScorer, Completion, scorer_named
from safety_lens.interventions.scorers.classifier import PRESETS, Known
from safety_lens.organism import answers

POSITIONS = 40
"""Positions of the tiny models; RoBERTa keeps those up to its padding index (1) for itself."""

NEUTRAL = ("The sky is blue.", "The train is late.", "Step one: plan ahead.", "Take your time.", "The day is lovely.")
MULTI = {0: "toxicity", 1: "insult", 2: "day"}
SINGLE = {0: "neutral", 1: "toxic"}


def sentences(seed: int, n: int = 60) -> tuple[list[str], list[str]]:
    """Rude and other sentences of the organism's kind."""
    rng = random.Random(seed)
    things = ("soup", "song", "hat", "poem", "cake")
    rude = [answers.remark(rng, rng.choice(things), rude=True) for _ in range(n)]
    other = [answers.remark(rng, rng.choice(things), rude=False) for _ in range(n // 2)]
    return rude + list(answers.RUDE_TAILS), other + [rng.choice(NEUTRAL) for _ in range(n // 2)]


def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({w for seed in range(3) for side in sentences(seed) for text in side for w in split(text)})
    extra = split("you are a stupid idiot dumb fool what nasty loser thank the lovely wonderful friend")
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys([*words, *extra])])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, sep_token="</s>", **special)


def split(text: str) -> list[str]:
    return [w for w, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())]


def trained(
    labels: dict[int, str], problem: str | None, targets: Sequence[Sequence[float]]
) -> RobertaForSequenceClassification:
    """A RoBERTa of a few thousand parameters, fitted for a moment; targets: label values of (other, rude) sentences."""
    words = tokenizer()
    rude, other = sentences(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=POSITIONS,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            id2label=labels,
            label2id={v: k for k, v in labels.items()},
            problem_type=problem,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = RobertaForSequenceClassification(config).train()
        batch = words([*other, *rude], padding=True, return_tensors="pt")
        wanted = torch.tensor([targets[0]] * len(other) + [targets[1]] * len(rude))
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            if problem == "multi_label_classification":
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
            else:
                loss = torch.nn.functional.cross_entropy(logits, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def save(model: RobertaForSequenceClassification, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    single = trained(SINGLE, "single_label_classification", [[1.0, 0.0], [0.0, 1.0]])
    found = {
        "multi": save(trained(MULTI, "multi_label_classification", [[0.0, 0.0, 0.5], [1.0, 0.9, 0.5]]), root / "multi"),
        "softmax": save(single, root / "softmax"),
    }
    single.config.id2label, single.config.label2id = {0: "toxic", 1: "neutral"}, {"toxic": 0, "neutral": 1}
    found["swapped"] = save(single, root / "swapped")
    single.config.id2label, single.config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    single.config.problem_type = None
    found["unnamed"] = save(single, root / "unnamed")
    with torch.no_grad():
        single.classifier.out_proj.weight.zero_()
    single.config.problem_type = "single_label_classification"
    found["constant"] = save(single, root / "constant")
    return found


def said(*texts: str) -> list[Completion]:
    return [Completion("What about the soup?", text) for text in texts]


UNSEEN = [text for side in sentences(7, 12) for text in side]


def forward(folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """Hugging Face's own forward, one text at a time: no padding, nothing of ours."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**words(text, return_tensors="pt")).logits for text in texts]).double()


def test_a_multi_label_head_is_read_by_a_sigmoid_of_the_toxicity_column(folders: dict[str, Path]) -> None:
    scorer = ClassifierScorer(folders["multi"], batch_size=5)
    assert (scorer.name, scorer.label, scorer.head, scorer.truncated) == ("toxicity", "toxicity", "sigmoid", 0)
    scores = scorer(said(*UNSEEN))
    np.testing.assert_allclose(scores, forward(folders["multi"], UNSEEN).sigmoid()[:, 0], atol=1e-5)
    rude = len(sentences(7, 12)[0])
    assert scores[:rude].min() > 0.5 > scores[rude:].max()


def test_a_softmax_head_is_read_by_a_softmax_over_its_labels(folders: dict[str, Path]) -> None:
    scorer = ClassifierScorer(folders["softmax"], batch_size=5)
    assert (scorer.name, scorer.label, scorer.head) == ("toxicity", "toxic", "softmax")
    scores = scorer(said(*UNSEEN))
    np.testing.assert_allclose(scores, forward(folders["softmax"], UNSEEN).softmax(-1)[:, 1], atol=1e-5)
    rude = len(sentences(7, 12)[0])
    assert scores[:rude].min() > 0.5 > scores[rude:].max()


@pytest.mark.parametrize(
    ("kind", "apply", "label"), [("multi", "sigmoid", "toxicity"), ("softmax", "softmax", "toxic")]
)
def test_scores_are_those_of_the_transformers_pipeline(
    folders: dict[str, Path], kind: str, apply: str, label: str
) -> None:
    pipe = pipeline("text-classification", str(folders[kind]), top_k=None, function_to_apply=apply, device="cpu")
    theirs = [next(x["score"] for x in row if x["label"] == label) for row in pipe(UNSEEN)]
    np.testing.assert_allclose(ClassifierScorer(folders[kind])(said(*UNSEEN)), theirs, atol=1e-5)


def test_swapped_labels_abort_with_the_scores_and_the_label(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"fails its self-test: its label 'toxic' \(softmax head\)") as caught:
        ClassifierScorer(folders["swapped"])
    message = str(caught.value)
    assert "You are a stupid idiot." in message
    assert "Thank you for the lovely day." in message
    assert "swapped" in message
    assert "0.0" in message


def test_the_formula_of_a_published_sweep_would_turn_scores_upside_down(folders: dict[str, Path]) -> None:
    pipe = pipeline("text-classification", str(folders["multi"]), device="cpu")
    theirs = [x["score"] if x["label"] == "TOXIC" else 1 - x["score"] for x in pipe(UNSEEN)]
    ours = ClassifierScorer(folders["multi"])(said(*UNSEEN))
    assert np.corrcoef(theirs, ours)[0, 1] < -0.5


def test_a_constant_classifier_aborts(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="fails its self-test"):
        ClassifierScorer(folders["constant"], label="LABEL_1")


def test_a_classifier_with_nan_weights_aborts(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders["multi"])
    with torch.no_grad():
        model.classifier.out_proj.bias[0] = float("nan")
    with pytest.raises(ModelError, match="fails its self-test"):
        ClassifierScorer(save(model, tmp_path))


def test_a_head_that_nobody_declares_is_an_error_and_an_argument_settles_it(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"does not say how its logits are read .*head='sigmoid'"):
        ClassifierScorer(folders["unnamed"], label="LABEL_1")
    declared = ClassifierScorer(folders["unnamed"], label="LABEL_1", head="softmax")
    assert declared.name == "label_1"
    np.testing.assert_allclose(declared(said(*UNSEEN)), ClassifierScorer(folders["softmax"])(said(*UNSEEN)), atol=1e-6)
    with pytest.raises(DataError, match="a head is one of sigmoid, softmax"):
        ClassifierScorer(folders["multi"], head="argmax")


def test_a_label_is_never_guessed_and_an_unknown_one_lists_those_there_are(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"no label that is known to mean toxicity.*LABEL_0, LABEL_1"):
        ClassifierScorer(folders["unnamed"], head="softmax")
    with pytest.raises(ModelError, match=r"no label 'TOXIC'.*toxicity, insult, day"):
        ClassifierScorer(folders["multi"], label="TOXIC")
    assert ClassifierScorer(folders["multi"], label="Insult").column == 1


def test_a_label_that_is_not_about_rudeness_takes_sentences_of_its_own(folders: dict[str, Path]) -> None:
    kind = Known(("Thank you, my friend.",), ("You are a loser.",))
    scorer = ClassifierScorer(folders["softmax"], label="neutral", known=kind)
    assert (scorer.name, scorer.column) == ("neutral", 0)
    with pytest.raises(ModelError, match="self-test"):
        ClassifierScorer(folders["softmax"], label="neutral")


def test_one_label_has_no_softmax(tmp_path: Path) -> None:
    model = trained({0: "toxic"}, "multi_label_classification", [[0.0], [1.0]])
    folder = save(model, tmp_path)
    assert ClassifierScorer(folder)(said("Shut up, you idiot."))[0] > 0.5
    with pytest.raises(ModelError, match="softmax is always 1"):
        ClassifierScorer(folder, head="softmax")


def test_long_texts_are_cut_counted_and_said(folders: dict[str, Path]) -> None:
    scorer = ClassifierScorer(folders["multi"])
    assert scorer.max_length == POSITIONS - 2
    filler = "the soup is a soup . " * 8
    assert len(split(filler)) > POSITIONS
    with pytest.warns(UserWarning, match=r"1 texts are longer than the 38 tokens .* toxicity"):
        scores = scorer(said(filler + "You idiot.", "You idiot."))
    assert scorer.truncated == 1
    kept = " ".join(split(filler)[: POSITIONS - 4])  # two of the 38 are <s> and </s>
    assert scores[0] == pytest.approx(float(scorer(said(kept))[0]), abs=1e-6)


def test_the_whole_length_of_the_model_can_be_used(folders: dict[str, Path]) -> None:
    assert np.isfinite(ClassifierScorer(folders["multi"])(said(" ".join(["soup"] * (POSITIONS - 4))))).all()


def test_an_empty_completion_is_unknown_not_clean(folders: dict[str, Path]) -> None:
    scores = ClassifierScorer(folders["multi"])(said("", "You idiot.", "  \n"))
    assert np.isnan(scores[[0, 2]]).all()
    assert scores[1] > 0.5
    assert ClassifierScorer(folders["multi"])([]).shape == (0,)


def test_the_prompt_is_scored_only_where_asked(folders: dict[str, Path]) -> None:
    rows = [Completion("You are a stupid idiot.", "The soup."), Completion("Thank you, dear.", "The soup.")]
    alone, both = (ClassifierScorer(folders["multi"], text=text)(rows) for text in ("completion", "both"))
    assert alone[0] == pytest.approx(alone[1], abs=1e-6)
    assert both[0] > both[1] + 0.2
    assert scorer_named(f"hf+prompt:{folders['multi']}").name == "toxicity+prompt"
    with pytest.raises(DataError, match="completion, both"):
        ClassifierScorer(folders["multi"], text="prompt")


def test_a_score_does_not_depend_on_the_batch(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders["multi"])
    words = model.roberta.embeddings.word_embeddings.weight
    with torch.no_grad():  # padding that the model would take for an insult if it were not masked
        words[1] = 20 * words[tokenizer().convert_tokens_to_ids("idiot")]
    folder = save(model, tmp_path)
    ragged = ["Bless you, dear.", "You idiot.", " ".join(["the poem of the day is a lovely cake"] * 3)]
    one, many = (ClassifierScorer(folder, batch_size=size)(said(*ragged)) for size in (1, 3))
    np.testing.assert_allclose(one, many, atol=1e-6)
    fields = AutoTokenizer.from_pretrained(folder)(ragged, padding=True, return_tensors="pt")
    with torch.no_grad():
        unmasked = model.eval()(fields["input_ids"], torch.ones_like(fields["attention_mask"])).logits.sigmoid()[:, 0]
    assert np.abs(unmasked.numpy() - one).max() > 1e-3


def test_one_sentence_on_the_wrong_side_is_enough_to_abort(folders: dict[str, Path]) -> None:
    tied = Known(("Shut up, you idiot.", "Bless you, dear."), ("Bless you, dear.",))
    with pytest.raises(ModelError, match="self-test"):
        ClassifierScorer(folders["multi"], known=tied)


@pytest.mark.parametrize("name", [*PRESETS, "nobody/no-such-classifier"])
def test_a_classifier_that_cannot_be_had_offline_is_one_clear_error(name: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot load the classifier {name}: .*hf download {name}.*lexicon:rude"):
        ClassifierScorer(name)


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is no trained classifier: it lacks classifier\."):
        ClassifierScorer(tmp_path)


def test_pickled_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["multi"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        ClassifierScorer(folder)


def test_the_command_line_names_model_label_and_head(folders: dict[str, Path]) -> None:
    assert scorer_named(f"hf:{folders['multi']}").name == "toxicity"
    assert scorer_named(f"hf:{folders['multi']}:insult").name == "insult"
    assert scorer_named(f"hf:{folders['unnamed']}:LABEL_1:softmax").name == "label_1"
    with pytest.raises(DataError, match="too many parts"):
        scorer_named(f"hf:{folders['unnamed']}:LABEL_1:softmax:more")
