"""Index some documents, then ask with and without reasoning, with a filter, and only where reasoning is worth it.

python examples/search.py
"""

import os
import tempfile
from pathlib import Path

from search_r3 import Document, Retriever, SearchR3

DOCUMENTS = [
    Document("tar", "Packs many files into one archive, and unpacks them.", "tar", {"kind": "archive"}),
    Document("zip", "Packs and compresses files into a Zip archive.", "zip", {"kind": "archive"}),
    Document("du", "Estimates how much space files and folders take.", "du", {"kind": "disk"}),
    Document("df", "Shows how much space is left on each file system.", "df", {"kind": "disk"}),
    Document("grep", "Finds lines that match a pattern.", "grep", {"kind": "text"}),
]

model = SearchR3.from_pretrained(os.environ.get("MODEL", "default"))
with tempfile.TemporaryDirectory() as folder, Retriever.create(Path(folder) / "index", model) as retriever:
    print(retriever.add(DOCUMENTS))
    question = "which folder fills my disk?"
    for found in (
        retriever.search(question, k=2),
        retriever.search(question, k=2, reason=True, max_new_tokens=32),
        retriever.search(question, k=2, hybrid=True, where={"kind": "disk"}),
    ):
        if found.reasoned:
            print(f"  thought: {found.reasoned.text}")
        print([(hit.id, round(hit.score, 3)) for hit in found.hits])
    many = retriever.search_many([question, "pack files"], k=1, gate=0.02, max_new_tokens=32)
    print("reasoned over", sum(found.reasoned is not None for found in many), "of", len(many), "questions")
