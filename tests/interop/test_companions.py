"""The files that travel with the weights."""

from moe_jax.interop.companions import companions, copy_companions

TRAVEL = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
STAY = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "README.md",
    "modeling_deepseek.py",
)


def test_tokenizer_template_and_licences_travel_and_weights_stay(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    for name in TRAVEL + STAY:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == {*TRAVEL, "additional_chat_templates"}
    assert (target / "LICENSE").read_text() == "LICENSE"
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "rag"


def test_a_folder_without_any_makes_none(tmp_path):
    assert companions(tmp_path / "nowhere") == []
    copy_companions(tmp_path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_links_into_a_cache_are_followed(tmp_path):
    # A download cache keeps blobs, and the folder of a model links to them.
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json").symlink_to(tmp_path / "blob")
    copy_companions(tmp_path / "a", tmp_path / "b")
    (tmp_path / "blob").unlink()
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
