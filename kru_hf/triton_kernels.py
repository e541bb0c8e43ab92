"""The Triton kernels of the GPU engine, a program a sample: what one step of the recurrence needs from the step before.

Letters: T steps, N units as a matrix H (P, R) of the two groups W = A ⊗ C, so that W h = A H C^T, or of TERMS pairs of
groups whose products add up; tiles are padded with zeros to powers of two. Complex tensors are pairs of planes, names
ending in r and i. Where STARTS are given, a step may begin with a state of zero.
"""

try:  # transformers demands what pushed code imports of everyone who loads it, except what stands in a try
    import triton
    import triton.language as tl
except ImportError:
    raise  # scan_triton.py says why its engine cannot run


@triton.jit
def _load(pointer, offsets, inside, plane):
    """Both planes of one tile; zeros outside."""
    return tl.load(pointer + offsets, mask=inside, other=0.0), tl.load(
        pointer + offsets + plane, mask=inside, other=0.0
    )


@triton.jit
def _store(pointer, offsets, inside, plane, real, imag):
    tl.store(pointer + offsets, real, mask=inside)
    tl.store(pointer + offsets + plane, imag, mask=inside)


@triton.jit
def _load_square(pointer, SIZE: tl.constexpr, TILE: tl.constexpr):
    """A complex (SIZE, SIZE) matrix, row by row: an exchanged read makes the fp32 products three times slower."""
    k = tl.arange(0, TILE)
    inside = (k[:, None] < SIZE) & (k[None, :] < SIZE)
    return _load(pointer, k[:, None] * SIZE + k[None, :], inside, SIZE * SIZE)  # (SIZE, SIZE)


@triton.jit
def _product(ar, ai, br, bi, PRECISION: tl.constexpr):
    """Complex matrix product as four real ones, accumulated in fp32."""
    real = tl.dot(ar, br, input_precision=PRECISION) - tl.dot(ai, bi, input_precision=PRECISION)
    imag = tl.dot(ar, bi, input_precision=PRECISION) + tl.dot(ai, br, input_precision=PRECISION)
    return real, imag


@triton.jit
def _modulus(zr, zi):
    """(power, inverse, zero): 1/|z · power| with a power of two that keeps |z|² in float32, 1 if z = 0; whether z = 0.

    NaN for an infinite z.
    """
    squared = zr * zr + zi * zi
    large, small = squared > 1.2676506002282294e30, squared < 7.888609052210118e-31  # 2^100, 2^-100
    power = tl.where(large, 1.262177448353619e-29, tl.where(small, 7.922816251426434e28, 1.0))  # 2^-96, 2^96
    zr, zi = zr * power, zi * power
    squared = zr * zr + zi * zi
    zero = squared == 0
    squared = tl.where(zero, 1.0, squared)
    return power, tl.rsqrt(squared) + 0.0 * squared, zero


@triton.jit
def _apply(
    hr, hi, ar, ai, cr, ci, left, right, TERMS: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    TILE_P: tl.constexpr, TILE_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ A H C (P, R) over the terms: the first one's A and C are given, the others read."""
    xr, xi = _product(hr, hi, cr, ci, PRECISION)  # (P, R) = H C
    zr, zi = _product(ar, ai, xr, xi, PRECISION)  # (P, R) = A H C
    for term in range(1, TERMS):
        br, bi = _load_square(left + term * 2 * P * P, P, TILE_P)  # (P, P)
        dr, di = _load_square(right + term * 2 * R * R, R, TILE_R)  # (R, R)
        xr, xi = _product(hr, hi, dr, di, PRECISION)  # (P, R)
        yr, yi = _product(br, bi, xr, xi, PRECISION)  # (P, R)
        zr += yr
        zi += yi
    return zr, zi


@triton.jit
def forward_kernel(
    inputs, left, right, bias, initial, mask, starts, states, final, moduli, length,
    TERMS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, TILE_P: tl.constexpr, TILE_R: tl.constexpr,
    MODRELU: tl.constexpr, MASKED: tl.constexpr, STARTS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = P * R
    sample = tl.program_id(0).to(tl.int64)
    p, r = tl.arange(0, TILE_P), tl.arange(0, TILE_R)
    tile, inside = p[:, None] * R + r[None, :], (p[:, None] < P) & (r[None, :] < R)  # (P, R)
    ar, ai = _load_square(left, P, TILE_P)  # (P, P): A
    cr, ci = _load_square(right, R, TILE_R)  # (R, R): C^T
    b = tl.load(bias + tile, mask=inside, other=0.0)  # (P, R)
    hr, hi = _load(initial + sample * 2 * N, tile, inside, N)  # (P, R)
    u_at = inputs + sample * length * 2 * N
    h_at = states + sample * length * 2 * N
    m_at = moduli + sample * length * N
    mask_at = mask + sample * length
    ur, ui = _load(u_at, tile, inside, N)  # (P, R)
    for t in range(length):
        # The next input is asked for before this step's products, which hide the way to memory.
        u_at += tl.where(t + 1 < length, 2 * N, 0)
        next_r, next_i = _load(u_at, tile, inside, N)  # (P, R)
        if STARTS:
            fresh = tl.load(starts + sample * length + t) != 0
            hr = tl.where(fresh, 0.0, hr)  # (P, R)
            hi = tl.where(fresh, 0.0, hi)  # (P, R)
        zr, zi = _apply(hr, hi, ar, ai, cr, ci, left, right, TERMS, P, R, TILE_P, TILE_R, PRECISION)  # (P, R) = A H C^T
        zr += ur
        zi += ui
        if MODRELU:
            power, inverse, zero = _modulus(zr, zi)  # (P, R)
            modulus = 1.0 / inverse / power  # (P, R): |z|, where z is not 0
            modulus = tl.where(zero, 0.0, modulus)  # (P, R)
            if SAVE:
                tl.store(m_at + tile, modulus, mask=inside)
                m_at += N
            # Idle, not active, is what is asked for: a NaN stays a NaN.
            idle = tl.where(zero, b < float("inf"), modulus + b <= 0)  # (P, R)
            scale = tl.where(idle, 0.0, 1.0 + b * inverse * power + 0.0 * modulus)  # (P, R)
            zr *= scale
            zi *= scale
        else:  # an infinity becomes NaN
            nothing = 0.0 * zr + 0.0 * zi  # (P, R)
            zr += nothing
            zi += nothing
        if MASKED:
            keep = tl.load(mask_at) != 0
            mask_at += 1
            zr = tl.where(keep, zr, hr)  # (P, R)
            zi = tl.where(keep, zi, hi)  # (P, R)
        hr, hi = zr, zi  # (P, R)
        _store(h_at, tile, inside, N, hr, hi)
        h_at += 2 * N
        ur, ui = next_r, next_i  # (P, R)
    _store(final + sample * 2 * N, tile, inside, N, hr, hi)


@triton.jit
def backward_kernel(
    d_states, d_final, left, right, bias, mask, starts, states, moduli, d_inputs, d_bias, d_initial, length,
    TERMS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, TILE_P: tl.constexpr, TILE_R: tl.constexpr,
    MODRELU: tl.constexpr, MASKED: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = P * R
    sample = tl.program_id(0).to(tl.int64)
    p, r = tl.arange(0, TILE_P), tl.arange(0, TILE_R)
    tile, inside = p[:, None] * R + r[None, :], (p[:, None] < P) & (r[None, :] < R)  # (P, R)
    ar, ai = _load_square(left, P, TILE_P)  # (P, P): A^H
    cr, ci = _load_square(right, R, TILE_R)  # (R, R): conj(C)
    b = tl.load(bias + tile, mask=inside, other=0.0)  # (P, R)
    db = tl.zeros((TILE_P, TILE_R), tl.float32)
    gr, gi = _load(d_final + sample * 2 * N, tile, inside, N)  # (P, R): gradient of h_t, from the future
    step = sample * length + length - 1  # 64 bits wide, as sample is
    er, ei = _load(d_states + step * 2 * N, tile, inside, N)  # (P, R)
    if MODRELU:
        hr, hi = _load(states + step * 2 * N, tile, inside, N)  # (P, R)
        m = tl.load(moduli + step * N + tile, mask=inside, other=0.0)  # (P, R)
    for back in range(length):
        earlier = step - tl.where(back + 1 < length, 1, 0)
        next_er, next_ei = _load(d_states + earlier * 2 * N, tile, inside, N)  # (P, R)
        gr += er
        gi += ei
        if MODRELU:
            next_hr, next_hi = _load(states + earlier * 2 * N, tile, inside, N)  # (P, R)
            next_m = tl.load(moduli + earlier * N + tile, mask=inside, other=0.0)  # (P, R)
            power, inverse, _ = _modulus(hr, hi)  # (P, R)
            idle = tl.where(m == 0, b < float("inf"), m + b <= 0)  # (P, R)
            # h = z + b·z/|z|: the radial part of the gradient passes as it is, the tangential one times 1 + b/|z|.
            nr, ni = hr * power * inverse, hi * power * inverse  # (P, R): h/|h| = z/|z|
            radial = nr * gr + ni * gi  # (P, R)
            ratio = b / tl.where(idle, 1.0, m)  # (P, R)
            # A NaN is not idle, and goes into the gradients.
            dr = tl.where(idle, 0.0, gr + ratio * (gr - nr * radial))  # (P, R)
            di = tl.where(idle, 0.0, gi + ratio * (gi - ni * radial))  # (P, R)
            radial = tl.where(idle, 0.0, radial)  # (P, R)
            hr, hi, m = next_hr, next_hi, next_m  # (P, R)
        else:
            dr, di, radial = gr, gi, tl.zeros((TILE_P, TILE_R), tl.float32)  # (P, R)
        if MASKED:
            keep = tl.load(mask + step) != 0
            dr = tl.where(keep, dr, 0.0)  # (P, R)
            di = tl.where(keep, di, 0.0)  # (P, R)
            radial = tl.where(keep, radial, 0.0)  # (P, R)
        db += radial
        _store(d_inputs + step * 2 * N, tile, inside, N, dr, di)
        # dH = A^H dZ conj(C)
        yr, yi = _apply(dr, di, ar, ai, cr, ci, left, right, TERMS, P, R, TILE_P, TILE_R, PRECISION)  # (P, R)
        if MASKED:
            yr = tl.where(keep, yr, gr)  # (P, R)
            yi = tl.where(keep, yi, gi)  # (P, R)
        if STARTS:
            fresh = tl.load(starts + step) != 0
            yr = tl.where(fresh, 0.0, yr)  # (P, R)
            yi = tl.where(fresh, 0.0, yi)  # (P, R)
        gr, gi = yr, yi  # (P, R)
        er, ei = next_er, next_ei  # (P, R)
        step = earlier
    _store(d_initial + sample * 2 * N, tile, inside, N, gr, gi)
    tl.store(d_bias + sample * N + tile, db, mask=inside)


@triton.jit
def gradient_kernel(
    d_inputs, group_a, group_c, initial, states, starts, d_a, d_c, length,
    TERMS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, TILE_P: tl.constexpr, TILE_R: tl.constexpr,
    CHUNK: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of a term's dA and dC over CHUNK steps of a sample, a program each: none waits for another."""
    N: tl.constexpr = P * R
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, r = tl.arange(0, TILE_P), tl.arange(0, TILE_R)
    tile, inside = p[:, None] * R + r[None, :], (p[:, None] < P) & (r[None, :] < R)  # (P, R)
    a_tile, a_inside = p[:, None] * P + p[None, :], (p[:, None] < P) & (p[None, :] < P)  # (P, P)
    c_tile, c_inside = r[:, None] * R + r[None, :], (r[:, None] < R) & (r[None, :] < R)  # (R, R)
    term = tl.program_id(2)
    ar, ai = _load(group_a + term * 2 * P * P, a_tile, a_inside, P * P)  # (P, P)
    cr, ci = _load(group_c + term * 2 * R * R, c_tile, c_inside, R * R)  # (R, R)
    da_r = tl.zeros((TILE_P, TILE_P), tl.float32)
    da_i = tl.zeros((TILE_P, TILE_P), tl.float32)
    dc_r = tl.zeros((TILE_R, TILE_R), tl.float32)
    dc_i = tl.zeros((TILE_R, TILE_R), tl.float32)
    for t in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, length)):
        at = (sample * length + t) * 2 * N
        dr, di = _load(d_inputs + at, tile, inside, N)  # (P, R)
        before = tl.where(t > 0, states + at - 2 * N, initial + sample * 2 * N)
        hr, hi = _load(before, tile, inside, N)  # (P, R): h_{t-1}
        if STARTS:
            fresh = tl.load(starts + sample * length + t) != 0
            hr = tl.where(fresh, 0.0, hr)  # (P, R)
            hi = tl.where(fresh, 0.0, hi)  # (P, R)
        yr, yi = _product(ar, ai, hr, hi, PRECISION)  # (P, R) = A H
        wr, wi = _product(tl.trans(dr), tl.trans(di), yr, -yi, PRECISION)  # (R, R) = dZ^T conj(A H)
        dc_r += wr
        dc_i += wi
        yr, yi = _product(dr, di, cr, -ci, PRECISION)  # (P, R) = dZ conj(C)
        wr, wi = _product(yr, yi, tl.trans(hr), -tl.trans(hi), PRECISION)  # (P, P) = dZ conj(C) H^H
        da_r += wr
        da_i += wi
    slot = (sample * tl.num_programs(1) + chunk) * TERMS + term
    _store(d_a + slot * 2 * P * P, a_tile, a_inside, P * P, da_r, da_i)
    _store(d_c + slot * 2 * R * R, c_tile, c_inside, R * R, dc_r, dc_i)
