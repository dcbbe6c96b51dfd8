"""Triton kernels of the causal convolution: an implicit matrix product over taps and channels, and what precedes it.

x is a buffer [B, KT − 1 + T, H, W, CI] of state and frames, y and residual are [B, T, H, W, CO], the weight is
[CO, KT, KH, KW, CI]. Channels and the kernel's sizes belong to a layer and are constants; frames, heights and widths
are never specialised on.

`tile_kernel` reads rectangles of a frame by the tensor memory engine, which fills what lies outside of the picture, or
past the last channel, with zeros: neither masks nor divisions are left in its loop. `pixel_kernel` is for other chips
and for channels that are no multiple of 16 bytes; its loops are nested, since one flat loop loses its asynchronous
copies in Triton 3.6.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["frames", "height", "width"])
def tile_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    frames,
    height,
    width,
    CI: tl.constexpr,
    CO: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """ROWS · COLUMNS pixels of one frame and OUT channels. x, weight, residual and y are tensor descriptors.

    The weight is the first factor, since Triton moves a reshaped first factor through registers.
    """
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    tile = tl.program_id(0)
    frame = tile // (across * down)
    top = (tile // across) % down * ROWS
    left = tile % across * COLUMNS
    out = tl.program_id(1) * OUT
    first = frame + frame // frames * (KT - 1)
    PASSES: tl.constexpr = (CI + IN - 1) // IN
    total = tl.zeros((OUT, ROWS * COLUMNS), tl.float32)
    for step in range(KT * KH * KW * PASSES):
        tap = step // PASSES
        channel = step % PASSES * IN
        row = top + tap // KW % KH - KH // 2
        pixels = x.load([first + tap // (KH * KW), row, left + tap % KW - KW // 2, channel])
        # Past the last channel these are the next tap's, times the zeros that pixels have there.
        factors = weight.load([out, tap * CI + channel])
        total = tl.dot(factors, pixels.reshape(ROWS * COLUMNS, IN).T, total)
    total = total.T
    if HAS_BIAS:
        column = out + tl.arange(0, OUT)
        total += tl.load(bias + column, mask=column < CO, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        added = residual.load([frame, top, left, out])
        total += added.reshape(ROWS * COLUMNS, OUT).to(tl.float32)
    y.store([frame, top, left, out], total.to(y.dtype).reshape(1, ROWS, COLUMNS, OUT))


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def pixel_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    pixels,
    frames,
    height,
    width,
    CI: tl.constexpr,
    CO: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """PIXELS of y's pixels, counted through clips, frames and rows, and OUT channels."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = tl.program_id(1) * OUT + tl.arange(0, OUT)
    inside = pixel < pixels
    frame = pixel // (height * width)
    row = pixel // width % height
    left = pixel % width
    first = frame + frame // frames * (KT - 1)
    channel = tl.arange(0, IN)
    EVEN: tl.constexpr = CI % IN == 0
    total = tl.zeros((PIXELS, OUT), tl.float32)
    for tap in range(KT * KH * KW):
        down = row + tap // KW % KH - KH // 2
        across = left + tap % KW - KW // 2
        seen = inside & (down >= 0) & (down < height) & (across >= 0) & (across < width)
        place = ((first + tap // (KH * KW)) * height + down) * width + across
        source = x + place.to(tl.int64)[:, None] * CI + channel[None, :]
        taken = weight + column.to(tl.int64)[None, :] * (KT * KH * KW * CI) + tap * CI + channel[:, None]
        for begin in range(0, CI, IN):
            if EVEN:
                values = tl.load(source + begin, mask=seen[:, None], other=0.0)
                factors = tl.load(taken + begin, mask=(column < CO)[None, :], other=0.0)
            else:
                left_over = channel < CI - begin
                values = tl.load(source + begin, mask=seen[:, None] & left_over[None, :], other=0.0)
                factors = tl.load(taken + begin, mask=(column < CO)[None, :] & left_over[:, None], other=0.0)
            total = tl.dot(values, factors, total, input_precision="ieee")
    written = inside[:, None] & (column < CO)[None, :]
    offset = pixel.to(tl.int64)[:, None] * CO + column[None, :]
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < CO, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + offset, mask=written, other=0.0).to(tl.float32)
    tl.store(y + offset, total.to(y.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["pixels", "of_frames", "of_state"])
def activate_kernel(
    x,
    buffer,
    pixels,
    of_frames,
    of_state,
    eps,
    CI: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """SiLU of RMSNorm over each pixel's channels, from x [B, T, H, W, CI] to behind the state in the buffer.

    A clip has `of_frames` pixels in x and `of_state` more in the buffer.
    """
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < CI)[None, :]
    source = pixel.to(tl.int64)[:, None] * CI + channel[None, :]
    values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, 1) / CI + eps)[:, None]
    activated = normed / (1 + tl.exp(-normed))
    place = pixel + (pixel // of_frames + 1) * of_state
    target = place.to(tl.int64)[:, None] * CI + channel[None, :]
    tl.store(buffer + target, activated.to(buffer.dtype.element_ty), mask=inside)
