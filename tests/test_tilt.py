"""The tilted reference and the rewards of words, against the plain way in float64."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import training_runs
from catpo.core.errors import UserError
from catpo.data.read import read_samples
from catpo.files.checksums import checksum
from catpo.files.json_files import read_json, write_json
from catpo.judges import Judge, as_verdicts, ask, open_judge
from catpo.judges._requests import request_of
from catpo.models import loading
from catpo.models.output_head import token_stats
from catpo.models.questions import YesNo, yes_less_no
from catpo.models.tilt import Tilt, TiltedHead
from catpo.rewards.store import RewardStore
from catpo.rewards.word_prefixes import WordPrefixes
from catpo.rewards.word_rewards import Probe, WordReward
from catpo.rewards.words import WordRow, by_pictures, from_bytes, to_bytes
from catpo.runtime.skip_log import SkipLog
from catpo.scoring.probe import learn
from catpo.scoring.score import score_pairs
from catpo.scoring.settings import PAPER_SETTINGS
from catpo.scoring.words import WordReader, WordSettings
from catpo.testing import loss_from_logits
from test_head import DIRECTIONS, LargestTensor, plain, problem
from test_word_prefixes import slow_tilt as slow_tilt_of_words
from tiny import llava, pairs

TILT = Tilt(
    ids=torch.tensor([[0, 10, 4], [3, -1, -1]]),
    rewards=torch.tensor([[-6.0, 2.5, -0.5], [-8.0, 0.0, 0.0]]),
    table=torch.tensor([0, 0, 1, 1, 0, 1, 0]),
)


def tilted_plainly(head, hidden):
    """The reference with its rewards added token by token: a head of its own for each position."""
    logits = head.logits(hidden)
    for position, table in enumerate(TILT.table.tolist()):
        for token, reward in zip(TILT.ids[table].tolist(), TILT.rewards[table].tolist(), strict=True):
            if token >= 0:
                logits[position, token] += reward
    return logits


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap, is_frozen", [(None, True), (None, False), (3.0, True), (3.0, False)])
def test_the_kl_to_the_tilted_reference_and_its_gradients_equal_the_plain_way(direction, softcap, is_frozen):
    hidden, head, tokens, reference_hidden, reference_head = problem(softcap=softcap)
    trained = [hidden] if is_frozen else [hidden, head.weight, head.bias]
    for tensor in trained:
        tensor.requires_grad_(True)
    q = tilted_plainly(reference_head, reference_hidden).log_softmax(-1)
    p = head.logits(hidden).log_softmax(-1)
    first, second = (p, q) if direction == DIRECTIONS[0] else (q, p)
    expected = (first.exp() * (first - second)).sum(-1)
    options = {"reference_head": TiltedHead.over(reference_head, TILT), "direction": direction, "tile_width": 3}
    stats = token_stats(hidden, head, tokens, reference_hidden=reference_hidden, **options)
    torch.testing.assert_close(stats.kl, expected, rtol=1e-10, atol=1e-10)
    logps, _ = plain(hidden, head, tokens, reference_hidden, reference_head, direction)
    torch.testing.assert_close(stats.logps, logps, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(kl.square().sum(), trained) for kl in (stats.kl, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-10)


def test_rewards_of_zero_tilt_nothing_and_no_tokens_by_vocabulary_tensor_exists():
    hidden, head, tokens, reference_hidden, reference_head = problem(tokens=128, width=8, vocabulary=1000, dtype=torch.float32)
    tilt = Tilt(torch.tensor([[1, 999]]), torch.zeros(1, 2), torch.zeros(128, dtype=torch.long))
    known = {"reference_hidden": reference_hidden, "tile_width": 125}
    plainly = token_stats(hidden, head, tokens, reference_head=reference_head, **known)
    with LargestTensor() as largest:
        tilted = token_stats(hidden, head, tokens, reference_head=TiltedHead.over(reference_head, tilt), **known)
    assert torch.equal(plainly.kl, tilted.kl) and largest.size == 128 * 125


# ---- the objective --------------------------------------------------------------------------------------------------------


def slow_tilt(policy, reference, tokens, rewards, *, sides, reverse=False):
    """KL(q || pi) or KL(pi || q) summed over tokens, in loops over plain numbers; q ~ pi_ref exp(r)."""
    total = 0.0
    for side in sides:
        for row in range(len(tokens[side])):
            tilted = [math.exp(value + rewards.get(token, 0.0)) for token, value in enumerate(reference[side][row])]
            own = [math.exp(value) for value in policy[side][row]]
            q, p = [value / sum(tilted) for value in tilted], [value / sum(own) for value in own]
            first, second = (p, q) if reverse else (q, p)
            total += sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
    return total


@pytest.mark.parametrize(
    "answers, sides", [("rejected", ["rejected"]), ("chosen", ["chosen"]), ("both", ["chosen", "rejected"])]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_objective_is_the_divergence_summed_over_the_models_own_answers(answers, sides, direction):
    random = np.random.default_rng(3)
    tokens = {"chosen": [1, 2, 3], "rejected": [4, 5]}
    policy, reference = ({side: random.normal(size=(len(ids), 7)) for side, ids in tokens.items()} for _ in range(2))
    rewards = {2: -6.0, 5: -0.5}
    given = {"policy": policy, "reference": reference, "tokens": tokens, "token_rewards": rewards}
    expected = slow_tilt(policy, reference, tokens, rewards, sides=sides, reverse=direction == DIRECTIONS[0])
    assert loss_from_logits(f"tilt(answers='{answers}', kl_direction='{direction}')", **given) == pytest.approx(
        expected, rel=1e-10
    )
    mixed = loss_from_logits(f"tilt(answers='{answers}', kl_direction='{direction}', tilt_weight=0.5, dpo_weight=2.0)", **given)
    assert mixed == pytest.approx(0.5 * expected + 2 * loss_from_logits("dpo", **{**given, "token_rewards": None}), rel=1e-10)


# ---- rewards of words -----------------------------------------------------------------------------------------------------


def rows():
    row = lambda pair, pictures, word, ids, label, x: WordRow(pair, pictures, word, ids, label, {"self_question": x})
    return [
        row("a", "P", "dog", (7, 9), 1, 3.0),
        row("a", "P", "dolphin", (7,), 0, -2.0),
        row("b", "P", "cat", (5,), -1, -1.5),
        row("b", "P", "dog", (7, 9), -1, 2.0),
        row("c", "Q", "cat", (5,), 1, 0.5),
        row("d", "Q", "cat", (5,), 0, 0.25),
    ]


def test_words_of_all_pairs_about_a_picture_are_one_table():
    tables = by_pictures(list(from_bytes(to_bytes(rows(), ["self_question"]), ["self_question"])), ["self_question"])
    assert tables["P"].words == ["dog", "dolphin", "cat"] and tables["P"].labels.tolist() == [1, 0, -1]
    assert tables["P"].features["self_question"].tolist() == [3.0, -2.0, -1.5]
    assert tables["Q"].labels.tolist() == [-1] and tables["Q"].features["self_question"].tolist() == [0.5]  # the pairs disagree


def test_a_word_is_rewarded_by_its_label_else_by_the_log_sigmoid_and_a_shared_token_by_the_best():
    table = by_pictures(rows(), ["self_question"])["P"]
    log_sigmoid = -math.log1p(math.exp(1.5))
    assert WordReward.of("self_question").of_words(table).tolist() == pytest.approx([0.0, -6.0, 2 * log_sigmoid])
    rewards = WordReward.of("self_question").of_tokens(table).rewards()
    assert rewards == pytest.approx({7: 0.0, 9: 0.0, 5: 2 * log_sigmoid})
    unlabelled = WordReward.of("self_question(labels=False, scale=3.0, slope=2.0, offset=1.0, floor=-4.0)").of_words(table)
    assert unlabelled.tolist() == pytest.approx([-3 * math.log1p(math.exp(-4)), -4.0, -4.0])


def test_a_probe_is_read_back_and_rewards_by_its_log_odds(tmp_path):
    probe = Probe(("self_question",), (1.0,), (2.0,), (4.0,), 0.5)
    probe.write(tmp_path / "probe.json", auroc=0.9)
    assert Probe.read(tmp_path / "probe.json") == probe
    table = by_pictures(rows(), ["self_question"])["P"]
    logits = [4 * (x - 1) / 2 + 0.5 for x in (3.0, -2.0, -1.5)]
    expected = [max(-8.0, -2 * math.log1p(math.exp(-x))) for x in logits]
    reward = WordReward.of(f"probe(file='{tmp_path}/probe.json', labels=False)")
    assert reward.of_words(table).tolist() == pytest.approx(expected) and reward.reads == ("self_question",)


@pytest.mark.parametrize(
    "reward, message",
    [
        ("self_qestion", "Did you mean 'self_question'"),
        ("self_question(flour=-3.0)", "no option 'flour'"),
        ("self_question(scale=0.0)", "larger than 0"),
        ("probe(file='nowhere.json')", "nowhere.json cannot be read"),
        ("self_question(file='p.json')", "only probe"),
    ],
)
def test_a_reward_that_cannot_be_made_is_refused_by_name(reward, message):
    with pytest.raises(UserError, match=message):
        loss_from_logits(f'tilt(reward="{reward}")', policy={}, reference={}, tokens={"chosen": [], "rejected": []})


def test_a_feature_that_was_not_scored_is_named():
    with pytest.raises(UserError, match="holds no 'patch_lens' of words .it holds: self_question"):
        WordReward.of("patch_lens").of_words(by_pictures(rows(), ["self_question"])["P"])


# ---- a store with words, and training from it -----------------------------------------------------------------------------

WORDS = {"cat": "cat", "mat": "mat", "circle": "circle", "square": "square", "table": "table", "laptop": "laptop", "dog": "dog"}
FEATURES = ("self_question", "log_prob", "patch_lens")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The tiny model, and a store of its pairs with words."""
    folder, family = tmp_path_factory.mktemp("words"), llava()
    (folder / "words.json").write_text(json.dumps(WORDS))
    settings = WordSettings(FEATURES, 0.002, "Is there {} in the image?", str(folder / "words.json"))
    return family, score_pairs(pairs(6), family, folder / "store", replace(PAPER_SETTINGS, words=settings), progress=False)


@torch.no_grad()
def logits_of(family, pair, side):
    """Whole logits of one response, and the patches' last hidden states, from a row of its own; float32."""
    encoded = family.encode(pair)
    ids = torch.tensor([[*encoded.prompt_ids, *encoded.response_ids[side]]])
    out = family.unwrapped(input_ids=ids, attention_mask=torch.ones_like(ids), **encoded.pixels, output_hidden_states=True)
    return out.logits[0, len(encoded.prompt_ids) - 1 : -1], out.hidden_states[-1][0, encoded.patches]


def test_the_features_of_words_are_those_of_whole_logits(scored):
    family, store = scored
    pair = pairs(6)[0]
    rows = {word: number for number, word in enumerate(store.words(pair).words)}
    assert "laptop" in rows or "cat" in rows
    both = [logits_of(family, pair, side) for side in ("chosen", "rejected")]
    probabilities = torch.cat([logits for logits, _ in both]).softmax(-1)
    lens = (both[0][1] @ family.head.weight.detach().T).log_softmax(-1)
    table = store.words(pair)
    for word, row in rows.items():
        ids = list(table.token_ids[row])
        assert table.features["log_prob"][row] == pytest.approx(float(probabilities[:, ids].max().log()), abs=1e-4)
        assert table.features["patch_lens"][row] == pytest.approx(float(lens[:, ids].max()), abs=1e-4)
        question = replace(pair, prompt=f"Is there a {word} in the image?", chosen="Yes", rejected="No")
        first, told = logits_of(family, question, "chosen")[0][0], YesNo.of(family)
        expected = first[list(told.yes)].max() - first[list(told.no)].max()
        assert table.features["self_question"][row] == pytest.approx(float(expected), abs=1e-4)


def losses_of(store, tmp_path, objective):
    """Of three pairs, after a change of the policy's weights that is the same each time; and the policy."""
    run = training_runs.trainer(llava(), tmp_path, pairs(6), objective=objective, rewards=str(store.path), max_steps=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in run.family.unwrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    batch = run.data_collator(pairs(6)[:3])
    return run.objective.loss(run.pair_stats(run.model, batch), **run.objective.options).losses.tolist(), run.family


def test_a_training_step_is_the_divergence_on_plain_logits(scored, tmp_path):
    family, store = scored
    losses, policy = losses_of(store, tmp_path, "tilt(answers='both')")
    for pair, loss in zip(pairs(6)[:3], losses, strict=True):
        given = {"policy": {}, "reference": {}, "tokens": family.encode(pair).response_ids}
        for side in ("chosen", "rejected"):
            given["policy"][side] = logits_of(policy, pair, side)[0].double().numpy()
            given["reference"][side] = logits_of(family, pair, side)[0].double().numpy()
        token_rewards = WordReward.of("self_question").of_tokens(store.words(pair)).rewards()
        assert token_rewards and min(token_rewards.values()) < 0
        expected = loss_from_logits("tilt(answers='both')", **given, token_rewards=token_rewards)
        assert loss == pytest.approx(expected, rel=2e-4)
    assert all(len(form) == 1 for forms in store.words(pairs(6)[0]).forms for form in forms)
    assert losses_of(store, tmp_path / "word", "tilt(answers='both', tokens='word')")[0] == losses  # to the digit


def test_a_training_step_on_whole_words_is_the_slow_divergence_on_plain_logits(tmp_path):
    """ "red square" and "red circle" begin with the same token, "square" with that of "square table"."""
    family, forms = llava(), ("square", "square table", "red square", "red circle", "red", "cat", "cats", "a cat")
    (tmp_path / "words.json").write_text(json.dumps({form: form for form in forms}))
    words = WordSettings(("self_question",), 0.002, "Is there {} in the image?", str(tmp_path / "words.json"))
    settings = replace(PAPER_SETTINGS, words=words)
    store = score_pairs(pairs(6), family, tmp_path / "store", settings, progress=False)
    losses, policy = losses_of(store, tmp_path / "run", "tilt(answers='both', tokens='word')")
    tables = 0
    for pair, loss in zip(pairs(6)[:3], losses, strict=True):
        table, expected = store.words(pair), 0.0
        rewards = dict[tuple[int, ...], float]()
        for written, reward in zip(table.forms, WordReward.of("self_question").of_words(table).tolist(), strict=True):
            rewards |= {form: max(reward, rewards.get(form, reward)) for form in written}
        for side, ids in family.encode(pair).response_ids.items():
            own, reference = (logits_of(model, pair, side)[0].double().numpy() for model in (policy, family))
            expected += slow_tilt_of_words(own, reference, ids, rewards, DIRECTIONS[1])
        assert loss == pytest.approx(expected, rel=2e-4)
        tables += len({prefix for ids in family.encode(pair).response_ids.values() for prefix in prefixes_of(rewards, ids)})
    assert tables > 3 and losses != losses_of(store, tmp_path / "first", "tilt(answers='both')")[0]
    for file in store.path.glob("shards/*.words.parquet"):  # as earlier versions wrote it
        rewritten(file)
    old = RewardStore.open(store.path)
    assert old.words(pairs(6)[0]).token_ids == store.words(pairs(6)[0]).token_ids
    with pytest.raises(UserError, match="earlier version.*Score the pairs again with --words, or give tokens='first'"):
        losses_of(old, tmp_path / "old", "tilt(tokens='word')")
    losses_of(old, tmp_path / "old", "tilt(answers='both')")


def prefixes_of(rewards, ids):
    return WordPrefixes(rewards.items()).open_before(ids)


def rewritten(file):
    """The words of a shard without their forms."""
    pq.write_table(pq.read_table(file).drop_columns(["forms"]), file)
    sums = file.with_name(file.name.replace(".words.parquet", ".json"))
    known = {name: value for name, value in read_json(sums).items() if name != "catpo_checksum"}
    write_json(sums, known | {file.name: checksum(file.read_bytes())})


def test_training_scores_what_it_reads_itself_and_comes_nearer_to_the_tilted_reference(tmp_path):
    options = {"per_device_train_batch_size": 6, "learning_rate": 3e-4, "max_steps": 25}
    objective = "tilt(answers='both', reward='log_prob')"
    done = training_runs.trainer(llava(), tmp_path, pairs(6), objective=objective, **options)
    done.train()
    losses = training_runs.curve(done, "tilt/divergence")
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_store_without_words_is_refused_before_training(scored, tmp_path):
    bare = score_pairs(pairs(6), llava(), tmp_path / "bare", progress=False)
    with pytest.raises(UserError, match="holds no words, which tilt rewards"):
        training_runs.trainer(llava(), tmp_path / "run", pairs(6), objective="tilt", rewards=str(bare.path))
    _, store = scored
    damaged = shutil.copytree(store.path, tmp_path / "damaged")
    file = next(damaged.glob("shards/*.words.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=f"{file.name} is missing or not what was written"):
        RewardStore.open(damaged).words(pairs(6)[0])


def test_unranked_pairs_teach_only_objectives_that_do_not_rank(scored, tmp_path):
    unranked = [replace(pair, meta={"unranked": True}) for pair in pairs(6)]
    for objective in ("dpo", "tilt", "tilt(answers='both', dpo_weight=1.0)"):
        with pytest.raises(UserError, match="is unranked"):
            training_runs.trainer(llava(), tmp_path / "no", unranked, objective=objective, rewards=str(scored[1].path))
    words = "words(vocabulary='{}')".format(tmp_path / "words.json")
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    settings = replace(PAPER_SETTINGS, words=WordSettings.of(words))
    store = score_pairs(unranked, llava(), tmp_path / "store", settings, progress=False)
    assert {label for pair in unranked for label in store.words(pair).labels.tolist()} == {-1}  # they say nothing
    training_runs.trainer(
        llava(), tmp_path / "run", unranked, objective="tilt(answers='both')", rewards=str(store.path), max_steps=1
    ).train()


class Likes(Judge):
    """Says yes to words with a t; of the second pair nothing that can be read."""

    def __init__(self, version="1"):
        self.version = version

    @property
    def identity(self):
        return {"name": "likes", "version": self.version, "decoding": {}}

    def ask(self, messages, *, key, attempt=1):
        if key.startswith(pairs(6)[1].id):
            return "Who knows?"
        return "\n".join(
            "yes" if "t" in line.split()[3] else "no" for line in request_of(messages).sections["Questions"].splitlines()
        )


def test_a_judge_says_which_words_are_there_and_what_cannot_be_read_is_no_reward(tmp_path, monkeypatch):
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    monkeypatch.setattr("catpo.scoring.words.open_judge", lambda text: Likes())
    settings = WordSettings.of(f"words(features=['judge'], floor=0.002, vocabulary='{tmp_path}/words.json')", judge="likes")
    store = score_pairs(pairs(6), llava(), tmp_path / "store", replace(PAPER_SETTINGS, words=settings), progress=False)
    assert store.provenance["words"]["judge"] == "likes" and store.provenance["words"]["judged_by"]["version"] == "1"
    with monkeypatch.context() as changed:
        changed.setattr("catpo.scoring.words.open_judge", lambda text: Likes(version="2"))
        with pytest.raises(UserError, match="words.judged_by.version is '1', now '2'"):
            score_pairs(pairs(6), llava(), tmp_path / "store", replace(PAPER_SETTINGS, words=settings), progress=False)
    tables = [store.words(pair) for pair in pairs(6)]
    assert tables[0].words and not tables[1].words
    for table in tables:
        assert table.features.get("judge", np.array([])).tolist() == [4.0 if "t" in word else -4.0 for word in table.words]
    reward = WordReward.of("judge(labels=False)").of_words(tables[0])
    assert {round(float(each), 2) for each in reward} <= {-8.0, -0.04}
    for text, judge in (("words(features=['judge'])", None), ("words", "likes")):
        with pytest.raises(UserError, match="needs a --judge"):
            WordSettings.of(text, judge)


def test_a_local_judge_is_a_teacher_and_answers_what_any_judge_is_asked():
    judge, family, sample = (
        open_judge("local(model='builtin', max_new_tokens=4)"),
        llava(),
        read_samples("scenes(count=1)", SkipLog("stop"))[0][0],
    )
    vars(judge)["_family"] = family
    questions = ["Is there a cat in the image?", "Is there a dog in the image?", "Is it red?"]
    margins = judge.margins(sample, questions)
    assert margins == yes_less_no(family, [(sample.images, questions)])[0]
    said = ask(judge, "verify", sample, as_verdicts(3), questions="\n".join(questions))
    assert said == [margin > 0 for margin in margins]
    assert ask(judge, "restyle", sample, str, answer="A cat.") is not None
    assert judge.identity["version"] == family.model_hash


# ---- the probe ------------------------------------------------------------------------------------------------------------


def test_a_probe_is_the_minimum_of_the_penalised_logistic_loss():
    random = np.random.default_rng(0)
    columns = random.normal(size=(200, 2)) * [3.0, 0.2] + [5.0, -1.0]
    labels = (columns[:, 0] + random.normal(size=200) > 5).astype(int)
    probe = Probe.fitted(("a", "b"), columns, labels)

    def loss(weights, intercept):
        z = (columns - columns.mean(0)) / columns.std(0)
        logits = z @ np.array(weights) + intercept
        return np.logaddexp(0, np.where(labels == 1, -logits, logits)).sum() + 0.5 * np.square(weights).sum()

    least = loss(probe.weights, probe.intercept)
    for change in np.eye(3) * 1e-2:
        for sign in (1, -1):
            moved = sign * change
            assert loss(np.array(probe.weights) + moved[:2], probe.intercept + moved[2]) > least
    logits = probe.logits({"a": columns[:, 0], "b": columns[:, 1]})
    assert loss(probe.weights, probe.intercept) == pytest.approx(
        np.logaddexp(0, np.where(labels == 1, -logits, logits)).sum() + 0.5 * np.square(probe.weights).sum()
    )


def test_a_probe_needs_words_of_both_kinds():
    with pytest.raises(UserError, match="only one kind, or none"):
        Probe.fitted(("a",), np.zeros((3, 1)), np.ones(3, dtype=int))
    with pytest.raises(UserError, match="only one kind, or none"):
        WordReward.of("probe").ready([])


def test_a_probe_of_which_one_kind_of_words_is_missing_is_read_back(tmp_path):
    """Only words that a response names are candidates here, so the table has no AUROC of unnamed ones."""
    samples = read_samples("scenes(count=4)", SkipLog("stop"))[0]
    settings = replace(PAPER_SETTINGS, words=WordSettings(("log_prob",), 0.999, "Is there {} in the image?", None))
    edited = []
    for pair, sample in zip(pairs(4), samples, strict=True):
        absent = next(name for name in ("camera", "guitar", "dolphin") if name not in sample.truth["present"])
        there = sample.truth["present"][0]
        edited.append(replace(pair, images=sample.images, chosen=f"Here is the {there}.", rejected=f"Here is the {absent}."))
    store = score_pairs(edited, loading.load("builtin"), tmp_path / "store", settings, progress=False)
    learned = learn(store.path, tmp_path / "probe.json", truth="scenes(count=4)")
    areas = {row.words: row.auroc for row in learned.rows if row.score == "probe"}
    assert math.isnan(areas["unnamed"]) and 0 <= areas["named"] <= 1
    assert Probe.read(tmp_path / "probe.json").features == ("log_prob",)


def test_other_models_say_that_only_built_in_words_are_asked_about(tmp_path, capsys):
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    with suppress(UserError):  # a tiny tokenizer has none of these words
        WordReader(llava(), WordSettings.of("words"))
    assert "only words for the built-in objects" in capsys.readouterr().err
    WordReader(loading.load("builtin"), WordSettings.of("words"))
    WordReader(llava(), WordSettings.of(f"words(vocabulary='{tmp_path}/words.json')"))
    assert capsys.readouterr().err == ""


def test_words_of_a_pair_that_reaches_none_are_those_of_its_pictures(scored):
    _, store = scored
    first, second = pairs(6)[:2]
    silent = replace(second, images=first.images)
    known, store._word_tables = store._word_tables, {}
    try:
        assert store.words(silent).words == known[first.id].words
    finally:
        store._word_tables = known
