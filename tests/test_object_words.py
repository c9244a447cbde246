"""Object words: the table is whole, and a text's mentions are found where they are."""

from catpo.text.object_words import classes, companion, contexts, default_vocabulary, mentions


def mentioned(text, vocabulary=None):
    return [(mention.object, text[mention.start : mention.end]) for mention in mentions(text, vocabulary)]


def test_at_least_48_classes_in_8_contexts_most_in_one_or_two():
    assert len(classes()) >= 48 and len(contexts()) >= 8
    assert sum(1 <= len(item.contexts) <= 2 for item in classes().values()) > 0.9 * len(classes())


def test_contexts_and_classes_name_each_other():
    for context, members in contexts().items():
        assert len(set(members)) == len(members)
        assert all(context in classes()[name].contexts for name in members)
    assert all(item.contexts for item in classes().values())


def test_no_surface_form_belongs_to_two_objects():
    forms = [form.lower() for item in classes().values() for form in {item.name, item.plural, *item.synonyms}]
    assert len(forms) == len(set(forms))


def test_companions_are_mutual():
    for context, members in contexts().items():
        for name in members:
            other = companion(context, name)
            assert other is None or companion(context, other) == name
    assert companion("farm", "airplane") is None


def test_every_form_and_phrase_is_found_as_its_object():
    for form, name in default_vocabulary().items():
        assert mentioned(f"Here: {form.upper()}, there.") == [(name, form.upper())]
    for item in classes().values():
        for count in (1, 2, 3):
            assert [name for name, _ in mentioned(f"We see {item.phrase(count)} here.")] == [item.name]


def test_longest_words_win_and_part_words_do_not_count():
    text = "A teddy bear, a bear and a palm tree near the carpet; scar, dogged, cat's."
    assert [name for name, _ in mentioned(text)] == ["teddy bear", "bear", "palm tree", "cat"]


def test_words_may_be_apart_by_any_white_space():
    assert mentioned("a traffic\n  light") == [("traffic light", "traffic\n  light")]


def test_own_vocabulary_replaces_the_built_in_one():
    vocabulary = {"Zebra": "zebra", "zebra crossing": "road"}
    assert mentioned("A zebra on a zebra crossing with a dog", vocabulary) == [("zebra", "zebra"), ("road", "zebra crossing")]
    assert mentions("a dog", {}) == []


def test_forms_with_marks_are_taken_literally():
    assert mentioned("a c++ book, a.b, axb", {"a.b": "point", "c++": "language"}) == [("language", "c++"), ("point", "a.b")]
