"""The tokenizers of the shapes world: a real `tokenizers` word-level model over the world's few dozen words.

Each family lays out its own with `of_words`. X-Omni's has text first, then image tokens, then the marks around an
image.

    0 .. V-1        specials, "\\n", words, and reserved tokens that pad V to a multiple of 16
    V .. V+n-1      <MM-Token-0> .. <MM-Token-{n-1}>, the n codes of the image tokenizer
    V+n ..          <SOM>, <EOM>, <IMAGE>

An image in a text is "<SOM>3 3<IMAGE><MM-Token-5>...<EOM>": its rows and columns, then its tokens in reading order.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gvu_jax.shapes.sentences import vocabulary

PAD, UNKNOWN, USER, ASSISTANT, END = SPECIALS = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|im_end|>")
START_OF_IMAGE, END_OF_IMAGE, IMAGE = IMAGE_MARKS = ("<SOM>", "<EOM>", "<IMAGE>")

# As short as a template can be: on a laptop every token counts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|im_end|>"
    "{% else %}{{ raise_exception('roles are user and assistant, got ' + message.role) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(image_vocab_size: int) -> PreTrainedTokenizerFast:
    """Builds the tokenizer for an image tokenizer with `image_vocab_size` codes.

    Text is lower-cased and split at single spaces and around "\\n", ",", "." and "?"; decoding puts it together
    again. Words the world does not know become <|unk|>. Padding is on the left. A size below 1 raises ValueError.
    """
    if image_vocab_size < 1:
        raise ValueError(f"image_vocab_size must be at least 1, got {image_vocab_size}")
    image = [f"<MM-Token-{k}>" for k in range(image_vocab_size)]
    return of_words(SPECIALS, [*image, *IMAGE_MARKS], pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE)


def of_words(specials, more=(), silent="", **named) -> PreTrainedTokenizerFast:
    """A tokenizer of the world's words for any family: `specials` first, UNKNOWN among them, then "\\n" and the words,
    and behind them the special tokens `more`.

    silent: characters of a chat's frame that are not read, such as ":": on a laptop every token counts. named:
    pad_token, eos_token and the like.
    """
    text = [*specials, "\n", *vocabulary()]
    reserved = [f"<|reserved_{k}|>" for k in range(-len(text) % 16)]
    text += reserved
    ids = {token: index for index, token in enumerate([*text, *more])}

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"[{silent}]+"), " "), normalizers.Lowercase()]) if silent else (
        normalizers.Lowercase())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"[\n,.?]"), "isolated")]
    )
    # Tokens are joined by spaces; then those before punctuation, and around newlines, specials and marks, go again.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[\n<,.?])|(?<=[\n>]) "), ""),
        ]
    )
    # Added tokens are found before a text is lower-cased and split, so images and marks need no spaces around them.
    marks = [*specials, *more]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in marks])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in reserved])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **named,
    )
