"""Make the digits demo from scratch: prompts, a tiny Stable Diffusion 3 pipeline, its rewards.

Data are scikit-learn's 1,797 handwritten digits. Everything follows from --seed: the same machine
writes the same bytes. Many captions in training name a random digit, so the finished model
draws clean digits but the wrong one nearly every second time: that is what reinforcement learning
is to repair, and unlike an early stop it does not depend on the exact length of training.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from calibrate_digits import calibration
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowkern.rewards import digits as rewards

WORDS = "zero one two three four five six seven eight nine".split()
TRAIN_TEMPLATES = (
    "{}",
    "a handwritten {}",
    "the digit {}",
    "the number {}",
    "a photo of the digit {}",
    "a scan of the number {}",
    "a drawing of the numeral {}",
    "the number {} on paper",
    "the digit {} written by hand",
    "a picture of a handwritten {}",
    "the handwritten numeral {}",
    "a written digit {} on paper",
)
TEST_TEMPLATES = (
    "a handwritten digit {}",
    "a photo of the numeral {}",
    "a scan of a handwritten {}",
    "the numeral {} on paper",
    "a drawing of the number {}",
    "the number {} written by hand",
)
TEXT_LENGTH = 8  # tokens: six words between the two that CLIP adds
PIPELINE_TEXT_LENGTH = 256  # T5 tokens a bare pipe(prompt) uses: the model must know both lengths
WRONG_CAPTIONS = 0.4


def prompts_of(templates: tuple[str, ...]) -> list[dict]:
    """Every template with every digit, as a word and as a numeral."""
    return [
        {"prompt": template.format(name), "digit": digit}
        for template in templates
        for digit in range(10)
        for name in (WORDS[digit], str(digit))
    ]


def write_prompts(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for split, templates in (("train", TRAIN_TEMPLATES), ("test", TEST_TEMPLATES)):
        lines = [json.dumps(prompt) + "\n" for prompt in prompts_of(templates)]
        (directory / f"{split}.jsonl").write_text("".join(lines))


def write_digits(directory: Path) -> None:
    """scikit-learn's digits with one fixed split; the held-out ones train nothing at all."""
    data = load_digits()
    indices = range(len(data.target))
    held_out = train_test_split(indices, test_size=297, stratify=data.target, random_state=0)[1]
    is_held_out = torch.zeros(len(data.target), dtype=torch.uint8)
    is_held_out[held_out] = 1
    tensors = {
        "ink": torch.tensor(data.images, dtype=torch.uint8),
        "label": torch.tensor(data.target, dtype=torch.uint8),
        "held_out": is_held_out,
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "digits.safetensors")


def clip_tokenizer(corpus: list[str], pad_token: str) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from the prompts: any text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=768, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    pieces += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: row for row, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=TEXT_LENGTH
    )


def t5_tokenizer(corpus: list[str]) -> T5Tokenizer:
    """T5's unigram model: the prompts' words by frequency, then single letters and figures."""
    words = [word for line in corpus for word in line.split()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    for word in sorted(set(words)):
        pieces.append(("▁" + word, math.log(words.count(word) / len(words))))
    known = {piece for piece, _ in pieces}
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces += [(letter, -20.0) for letter in letters if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        initializer_factor=2.0,  # CLIP's own scale suits far longer training
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_pipeline(corpus: list[str]) -> StableDiffusion3Pipeline:
    """Every part of a Stable Diffusion 3.5, untrained and small; latents are (1, 8, 8)."""
    tokenizers = [clip_tokenizer(corpus, pad) for pad in ("<|endoftext|>", "!")]
    t5 = t5_tokenizer(corpus)
    t5_config = T5Config(
        vocab_size=len(t5), d_model=64, d_kv=16, d_ff=64, num_heads=4, num_layers=1
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 16, 32],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=1,
        sample_size=rewards.IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_encoder(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_encoder(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel(t5_config),
        tokenizer_3=t5,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cosine_adamw(parameters: list, learning_rate: float, steps: int):
    """AdamW and a schedule: 50 steps up, then a cosine down to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)

    def factor(step: int) -> float:
        return min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(loss: torch.Tensor, optimizer, schedule) -> float:
    """One step of the optimizer on a loss, gradients clipped at norm 1; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int) -> None:
    """Reconstruction, latents pulled towards a thumbnail; then the latents' mean and scale.

    A pull to a unit normal alone whitens the latents, and a whitened digit is noise to a flow.
    """
    optimizer, schedule = cosine_adamw(list(vae.parameters()), 3e-3, steps)
    for _ in (bar := tqdm(range(steps), desc="vae")):
        batch = images[torch.randint(len(images), (48,))] * 2 - 1
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        error = error + 0.1 * F.mse_loss(posterior.mode(), rewards.to_pixels(batch / 2 + 0.5))
        loss = update(error + 1e-6 * posterior.kl().mean(), optimizer, schedule)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    vae.requires_grad_(False).eval()
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )


def train_flow(
    pipeline: StableDiffusion3Pipeline, images: torch.Tensor, labels: torch.Tensor, steps: int
) -> None:
    """Flow matching of the transformer and its text encoders, together; sigma is logit-normal."""
    vae = pipeline.vae
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    captions = [
        [one["prompt"] for one in prompts_of(TRAIN_TEMPLATES) if one["digit"] == digit]
        for digit in range(10)
    ]
    flat, per_digit = [caption for digit in captions for caption in digit], len(captions[0])
    trained = [
        pipeline.transformer,
        pipeline.text_encoder,
        pipeline.text_encoder_2,
        pipeline.text_encoder_3,
    ]
    parameters = [p for module in trained for p in module.train().parameters()]
    optimizer, schedule = cosine_adamw(parameters, 2e-3, steps)
    for step in (bar := tqdm(range(steps), desc="flow")):
        # One step in sixteen sees the long text of a bare pipe(prompt), with fewer rows.
        length, count = (PIPELINE_TEXT_LENGTH, 24) if step % 16 == 15 else (TEXT_LENGTH, 128)
        rows = torch.randint(len(latents), (count,))
        is_wrong = torch.rand(count) < WRONG_CAPTIONS
        shown = torch.where(is_wrong, torch.randint(10, (count,)), labels[rows])
        picks = shown * per_digit + torch.randint(per_digit, (count,))
        distinct, index = picks.unique(return_inverse=True)
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=[flat[pick] for pick in distinct.tolist()],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        x0, noise = latents[rows], torch.randn(count, *latents.shape[1:])
        sigma = torch.sigmoid(torch.randn(count) + 0.4)
        x_t = torch.lerp(x0, noise, sigma[:, None, None, None])
        velocity = pipeline.transformer(
            x_t, tokens[index], pooled[index], 1000 * sigma, return_dict=False
        )[0]
        loss = update(F.mse_loss(velocity, noise - x0), optimizer, schedule)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    for module in trained:
        module.eval()


def fit(network: torch.nn.Module, pixels, labels, steps: int, name: str) -> None:
    """Train a digit network with label smoothing on pixels a little shifted and noisy."""
    optimizer, schedule = cosine_adamw(list(network.parameters()), 3e-3, steps)
    network.train()
    for _ in (bar := tqdm(range(steps), desc=name)):
        rows = torch.randint(len(pixels), (128,))
        padded = F.pad(pixels[rows], (1, 1, 1, 1), value=-1.0)
        top, left = torch.randint(3, (2,)).tolist()
        batch = padded[:, :, top : top + 8, left : left + 8]
        batch = batch + 0.2 * torch.rand(len(batch), 1, 1, 1) * torch.randn(batch.shape)
        loss = F.cross_entropy(network(batch), labels[rows], label_smoothing=0.05)
        bar.set_postfix(loss=f"{update(loss, optimizer, schedule):.3f}", refresh=False)
    network.eval()


def train_rewards(directory: Path, seed: int, steps: int) -> None:
    """The classifier on the whole training split; the judge on 80 % of it, with another seed."""
    images, labels = rewards.real_digits("train", directory)
    pixels = rewards.to_pixels(images)
    torch.manual_seed(seed + 1)
    classifier = rewards.build_classifier()
    fit(classifier, pixels, labels, steps, "classifier")
    torch.manual_seed(seed + 2)
    judge = rewards.build_judge()
    part = torch.randperm(len(pixels))[: len(pixels) * 4 // 5]
    fit(judge, pixels[part], labels[part], 2 * steps, "judge")
    save_file(classifier.state_dict(), directory / "classifier.safetensors")
    save_file(judge.state_dict(), directory / "judge.safetensors")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="the bytes depend on it")
    parser.add_argument("--vae-steps", type=int, default=500)
    parser.add_argument("--flow-steps", type=int, default=2000)
    parser.add_argument("--reward-steps", type=int, default=600)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    reward_directory = arguments.assets / "digits-rewards"
    model_directory = arguments.assets / "digits-sd3"
    write_prompts(arguments.assets / "digits-prompts")
    write_digits(reward_directory)
    train_rewards(reward_directory, arguments.seed, arguments.reward_steps)

    torch.manual_seed(arguments.seed)
    images, labels = rewards.real_digits("train", reward_directory)
    pipeline = build_pipeline([one["prompt"] for one in prompts_of(TRAIN_TEMPLATES)])
    train_vae(pipeline.vae, images, arguments.vae_steps)
    train_flow(pipeline, images, labels, arguments.flow_steps)
    shutil.rmtree(model_directory, ignore_errors=True)
    pipeline.save_pretrained(model_directory)

    report = calibration(arguments.assets, model_directory, arguments.seed)
    (reward_directory / "accuracies.json").write_text(report + "\n")
    print(report, f"{time.perf_counter() - start:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
