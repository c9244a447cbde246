"""Questions about a thing that catpo does not ask in these words: what the models of two studies are taught to answer."""

WORDINGS = (
    "Does the photograph show {}?",
    "Can you see {} here?",
    "Do you notice {} in this photo?",
    "{} can be seen. Is that true?",
)
