"""peft's settings of an adapter: which make sense, what they say of alpha and rank, and what is said of the others."""

from sfumato.files.peft import PeftSettings, check_peft_settings, parse_object
from tests.files.said import said


def test_settings_that_make_no_sense():
    target = ("unet", "a.to_q")
    assert said(PeftSettings("s", {"unet.lora_alpha": True}).alpha, target, 4) == (
        "s gives unet.lora_alpha as True, wanted a number. Save it again."
    )
    assert said(PeftSettings("s", {"unet.alpha_pattern": {"a|b": 3}}).alpha, target, 4) == (
        "s: alpha_pattern has the regular expression 'a|b', which is not run; wanted the names of modules. Save it "
        "with them."
    )
    assert said(parse_object, "[]", "s") == "s is not a JSON object. Save the file again."
    assert said(parse_object, "[" * 100_000, "s") == "s is not a JSON object. Save the file again."
    assert said(check_peft_settings, {"unet.init_lora_weights": "PiSSA_niter_4"}, "s") == (
        "s: init_lora_weights is 'PiSSA_niter_4', so the adapter belongs to a base that peft changed before training. "
        "Save it with path_initial_model_for_weight_conversion."
    )
    assert said(check_peft_settings, {"unet.use_qalora": True}, "s") == (
        "s: use_qalora is set, which is not read. Merge it with peft itself."
    )
    fine = {"unet.init_lora_weights": "gaussian", "unet.fan_in_fan_out": False, "a": True}
    assert check_peft_settings(fine, "s") == fine


def test_settings_that_make_sense():
    def alpha(**values):
        return PeftSettings("s", {f"unet.{key}": value for key, value in values.items()}).alpha(("unet", "b.a.to_q"), 4)

    assert alpha() == 4
    assert alpha(lora_alpha=8) == 8
    assert alpha(lora_alpha=999_999_999) == 999_999_999
    assert "wanted a number" in said(alpha, lora_alpha=10**9)
    assert alpha(alpha=2, lora_alpha=8) == 2
    assert alpha(lora_alpha=8, use_rslora=True) == 16
    assert alpha(lora_alpha=8, use_rslora="yes") == 8
    for pattern, taken in {
        "to_q": True, "a.to_q": True, "^to_q": False, "^b.a.to_q": True, "b\\.a\\.to_q$": True, "o_q": False,
    }.items():  # fmt: skip
        assert alpha(lora_alpha=8, alpha_pattern={"other": 1, pattern: 3}) == (3 if taken else 8), pattern
    settings = PeftSettings("s", {"unet.r": 6, "unet.rank_pattern": {"to_k": 5}, "text_encoder.r": 0})
    assert [settings.rank(("unet", f"a.to_{x}"), 4) for x in "qk"] == [6, 5]
    assert settings.rank(("text_encoder", "a"), 4) == 4
    assert settings.rank(("text_encoder_2", "a"), 4) == 4
    assert settings.get(("unet", "x"), "r") == 6
    assert settings.get(("vae", "x"), "r") is None
