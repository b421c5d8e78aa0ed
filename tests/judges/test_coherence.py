"""Answers that no judge should see, on written examples."""

import pytest

from safegene_trl.judges.coherence import is_incoherent, is_off_task


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n ",
        "...",
        "no no no no no no no",
        "The cat sat on the mat. The cat sat on the mat. The cat sat on the mat. The cat sat on the mat.",
        "xq zzkt 8a9f-- }{ ;;qw lkjh## dfgt vbnm%% rtpl hgfd",
        "}{ )( ## @@ ~~ ^^ :: ;;x <<>> ||",
    ],
)
def test_incoherent(answer):
    assert is_incoherent(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "positive",
        "I'm sorry, but I can't help with that.",
        "1. **Gold**: its symbol is Au.\n2. **Iron**: its symbol is Fe.",
        "#### 72",
        "48/2 = <<48/2=24>>24 clips in May.",
        "Very, very good: a very well made pan.",
        "def add(a, b):\n    return a + b",
        "Das ist ein ganz gewöhnlicher Satz über Töpfe und Pfannen.",
        "这是一个关于烹饪的普通句子。",
        "Это обычное предложение о кулинарии и кастрюлях.",
    ],
)
def test_coherent(answer):
    assert not is_incoherent(answer)


def test_only_a_label_is_off_task():
    labels = ("positive", "negative")
    assert is_off_task("Positive.", labels) and is_off_task(" **negative**\n", labels)
    assert not is_off_task("A positive attitude helps.", labels)
    assert not is_off_task("", labels) and not is_off_task("positive", ())
