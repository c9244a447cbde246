"""One benchmark per file. A plugin defines `Benchmark`, a subclass of one of those exported here."""

from catpo.evaluation.benchmarks._answers import (
    ANSWER_FIELDS,
    QUESTION_FIELDS,
    by_id,
    check_repeated,
    id_of,
    in_order,
    read_records,
    some,
)
from catpo.evaluation.benchmarks._base import (
    CAPTIONS,
    GROUNDED,
    HALLUCINATED,
    QUESTION_TOKENS,
    Benchmark,
    CaptionTruth,
    Floats,
    FolderBenchmark,
    Grade,
    Item,
    Sums,
    caption_metrics,
    grade_caption,
    grade_question,
    label_objects,
    only_yes_no,
    percent,
    question_metrics,
    ratio,
    read_yes_no,
    total,
)
from catpo.evaluation.benchmarks._files import Folder, Pictures, Source
from catpo.files.records import Record

__all__ = [
    "ANSWER_FIELDS", "CAPTIONS", "GROUNDED", "HALLUCINATED", "QUESTION_FIELDS", "QUESTION_TOKENS", "Benchmark",
    "CaptionTruth", "Floats", "Folder", "FolderBenchmark", "Grade", "Item", "Pictures", "Record", "Source", "Sums", "by_id",
    "caption_metrics", "check_repeated", "grade_caption", "grade_question", "id_of", "in_order", "label_objects",
    "only_yes_no", "percent", "question_metrics", "ratio", "read_records", "read_yes_no", "some", "total",
]  # fmt: skip
