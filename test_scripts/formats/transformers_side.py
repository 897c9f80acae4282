"""Started by another interpreter, which has transformers and PEFT: computes logits of exported models.

python transformers_side.py transformers MODEL CODES OUT      a model of transformers
python transformers_side.py adapter MODEL ADAPTER CODES OUT   the same with an adapter of PEFT
python transformers_side.py moshi BASE ADAPTER CODES OUT      moshi's own class with an adapter of PEFT
python transformers_side.py save MODEL OUT                    what transformers itself writes
"""

import importlib.util
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import MoshiForConditionalGeneration

NO_MOSHI = 3  # exit status


def logits_of_transformers(model, codes):
    """Text logits [B, T, text_card] and audio logits [B, dep_q, T, card] of delayed codes [B, K, T + 1]."""
    dep_q = (codes.shape[1] - 1) // 2
    heard, said = (
        codes[:, :, :-1],
        codes[:, :dep_q, 1:],
    )  # text and all codebooks but the last go into the depth
    moshi, user = heard[:, 1 : 1 + dep_q], heard[:, 1 + dep_q :]
    out = model(input_ids=heard[:, 0], moshi_audio_codes=moshi, user_audio_codes=user, use_cache=False)
    hidden = out.last_hidden_state.flatten(0, 1)[:, None].expand(-1, dep_q, -1)
    audio = model.depth_decoder(input_ids=said.transpose(1, 2).flatten(0, 1), last_hidden_state=hidden).logits
    return out.logits, audio.unflatten(0, out.logits.shape[:2]).transpose(1, 2)


def logits_of_moshi(base, adapter, codes):
    """The same of moshi's LMModel."""
    from moshi.models.loaders import CheckpointInfo
    from peft import PeftModel

    names = ("mimi_config_path", "mimi_config.json"), ("config_path", "config.json")
    paths = {name: f"{base}/{file}" for name, file in names}
    files = {"moshi_weights": "model", "mimi_weights": "mimi"}
    paths |= {name: f"{base}/{file}.safetensors" for name, file in files.items()}
    info = CheckpointInfo.from_hf_repo("unused", tokenizer=f"{base}/tokenizer.model", **paths)
    model = PeftModel.from_pretrained(info.get_moshi(device="cpu", dtype=torch.float32), adapter)
    model = model.merge_and_unload()
    hidden, text = model.forward_text(codes[:, :, :-1])
    return text[:, 0], model.forward_depformer_training(codes[:, :, 1:], hidden)


def main(what, *paths):
    """Do what the command line says."""
    if what == "save":
        MoshiForConditionalGeneration.from_pretrained(paths[0]).save_pretrained(paths[1])
        return 0
    codes = load_file(paths[-2])["codes"]
    with torch.no_grad():
        if what == "moshi":
            if importlib.util.find_spec("moshi") is None:
                return NO_MOSHI
            text, audio = logits_of_moshi(*paths[:2], codes)
        else:
            model = MoshiForConditionalGeneration.from_pretrained(paths[0]).eval()
            if what == "adapter":
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, paths[1]).eval()
            text, audio = logits_of_transformers(model, codes)
    save_file({"text": text.contiguous(), "audio": audio.contiguous()}, paths[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
