"""The real classes of Segment Anything, Grounding DINO and OWLv2, with a few layers, saved to folders as their weights from elsewhere would be.

    PYTHONPATH=tests/site python talas_phase1.py ...        Segment Anything's vit_b is the tiny one there, and torchvision can be imported

`make_detectors` and `make_sam` need a second and ten. The OWLv2 finds what looks unlike the rest, a grid cell at a time, and gives a box of a
cell's size around the cell's lower right corner, where OWLv2's boxes are before they learn; the Segment Anything has learned that a box's mask is its
inside: so the pixels of a box can be followed from a frame to a mask.
"""

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F


def declare_torchvision() -> None:
    """torchvision declares its compiled operators' meta kernels on import. Where its library is not for this torch, as PyPI's is not for a CPU-only
    one, the operators themselves are missing."""
    if not hasattr(declare_torchvision, "library"):
        declare_torchvision.library = None
        try:
            torch.ops.load_library(next(Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C.*")))
        except (OSError, StopIteration):  # where it can be loaded, it defines them; twice would abort
            declare_torchvision.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                declare_torchvision.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def register_sam() -> None:
    """From now on this process's --sam-type vit_b is build_sam's."""
    declare_torchvision()
    import segment_anything

    segment_anything.sam_model_registry["vit_b"] = build_sam


def build_sam(checkpoint: None = None):
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "out_chans": 32, "use_rel_pos": True, "window_size": 0}
    prompts = {"embed_dim": 32, "image_embedding_size": (8, 8), "input_image_size": (64, 64), "mask_in_chans": 4}
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=32, num_heads=4)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, num_multimask_outputs=3, iou_head_depth=2, iou_head_hidden_dim=16)
    return Sam(ImageEncoderViT(**encoder, global_attn_indexes=(0,)), PromptEncoder(**prompts), decoder)


def make_sam(path: Path) -> None:
    """Weights of build_sam(), trained for some seconds to draw a box's inside, whatever the image."""
    torch.manual_seed(0)
    sam = build_sam()
    last = sam.image_encoder.neck[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    optimizer, image = torch.optim.Adam(sam.parameters(), 5e-3), torch.zeros(1, 32, 8, 8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 400)
    y, x = torch.meshgrid(2 * torch.arange(32) + 1, 2 * torch.arange(32) + 1, indexing="ij")
    for _ in range(400):
        corner = torch.rand(16, 2) * 52
        box = torch.cat([corner, (corner + 12 + torch.rand(16, 2) * 8).clamp(max=64)], 1)
        left, top, right, bottom = box.view(16, 4, 1, 1).unbind(1)
        inside = ((x > left) & (x < right) & (y > top) & (y < bottom)).float()
        sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
        logits, _ = sam.mask_decoder(image, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], inside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    quality = sam.mask_decoder.iou_prediction_head.layers[-1]
    torch.nn.init.zeros_(quality.weight)
    torch.nn.init.constant_(quality.bias, 0.5)
    torch.save(sam.state_dict(), path)


def make_detectors(folder: Path) -> None:
    """folder/dino and folder/owl: models, tokenizers and image processors."""
    declare_torchvision()
    import transformers as hf

    torch.manual_seed(0)
    words = [f"[unused{i}]" for i in range(1100)]
    for i, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}.items():  # BERT's own numbers
        words[i] = word
    words[1030:1034] = "walker", "hand", "hammer", "nail"
    (folder / "vocab.txt").write_text("\n".join(words))
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2}
    bert = {"vocab_size": 1100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 30, "max_text_len": 32}
    parts = {"backbone_config": hf.SwinConfig(**swin, out_features=["stage2", "stage3", "stage4"]), "text_config": hf.BertConfig(**bert)}
    dino = hf.GroundingDinoConfig(**parts, d_model=32, encoder_attention_heads=2, decoder_attention_heads=2, **layers)
    dino = hf.GroundingDinoForObjectDetection(dino)
    with torch.no_grad():
        dino.bbox_embed[-1].layers[-1].bias[2:] = 1.0  # boxes that are large enough to be drawn
    dino.save_pretrained(folder / "dino")
    tokenizer = hf.BertTokenizerFast(str(folder / "vocab.txt"))
    images = hf.GroundingDinoImageProcessor(size={"height": 128, "width": 128})
    hf.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder / "dino")

    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = hf.CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16, pad_token="<|endoftext|>")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 16, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.Owlv2Config(text_config=small | text, vision_config=small | {"image_size": 64, "patch_size": 16}, projection_dim=16)
    owl = hf.Owlv2ForObjectDetection(config)
    with torch.no_grad():
        for layer in (owl.box_head.dense2, owl.class_head.logit_shift, owl.class_head.logit_scale):  # boxes are the grid's cells, logits cosines
            layer.weight.zero_()
            layer.bias.zero_()
        processor = hf.Owlv2Processor(hf.Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer)
        image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
        image[:16, :16] = 255
        logits = owl(**processor(images=[image], text=[["hand"]], return_tensors="pt")).logits[0, :, 0]
        if logits[0] < logits[1]:  # the sign with which the odd cell out is the likest one
            for parameter in owl.class_head.dense0.parameters():
                parameter.neg_()
    owl.save_pretrained(folder / "owl")
    processor.save_pretrained(folder / "owl")
