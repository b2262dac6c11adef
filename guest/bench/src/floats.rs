//! Floating point and vectors. All sums are of small whole numbers, or in a fixed order: the same result everywhere.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m128, __m256, _mm_add_ps, _mm_loadu_ps, _mm_mul_ps, _mm_set1_ps, _mm_setzero_ps, _mm_storeu_ps, _mm256_add_ps,
    _mm256_loadu_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};
use std::hint::black_box;
use std::io;

use crate::measure::{Kind, Numbers, Unit, Workload};

const fn row(name: &'static str, batch: u64, start: fn() -> io::Result<Unit>, what: &'static str) -> Workload {
    Workload { name, kind: Kind::Float, what, batch, start }
}

pub(crate) const WORKLOADS: &[Workload] = &[
    row("matmul", 1, matmul, "a product of two matrices, 24 by 24, f64, scalar"),
    row("nbody", STEPS, nbody, "a step of five bodies' motion, f64: divisions and roots"),
    row("simd-sse", 2 * FLOATS as u64, simd_sse, "a float multiplied and added, SSE, 4 at a time"),
    row("simd-avx2", 2 * FLOATS as u64, simd_avx, "a float multiplied and added, AVX, 8 at a time"),
];

const SIDE: usize = 24;
type Matrix = [[f64; SIDE]; SIDE];

fn matmul() -> io::Result<Unit> {
    let mut numbers = Numbers(29);
    let mut matrix = || -> Box<Matrix> { Box::new([(); SIDE].map(|()| [(); SIDE].map(|()| numbers.below(64) as f64))) };
    let (left, right, mut product) = (matrix(), matrix(), Box::new([[0.0; SIDE]; SIDE]));
    Ok(Box::new(move || {
        multiply(&left, &right, &mut product);
        Ok(product.as_flattened().iter().fold(0, |sum: u64, value| sum.rotate_left(1) ^ value.to_bits()))
    }))
}

/// Row by column, one sum at a time: the compiler may not reorder it into vectors.
#[inline(never)]
fn multiply(left: &Matrix, right: &Matrix, product: &mut Matrix) {
    for row in 0..SIDE {
        for column in 0..SIDE {
            let mut sum = 0.0;
            for index in 0..SIDE {
                sum += left[row][index] * right[index][column];
            }
            product[row][column] = sum;
        }
    }
}

const STEPS: u64 = 64;

#[derive(Clone, Copy)]
struct Body {
    place: [f64; 3],
    speed: [f64; 3],
    mass: f64,
}

fn nbody() -> io::Result<Unit> {
    let mut numbers = Numbers(31);
    let mut three = || [(); 3].map(|()| numbers.below(1000) as f64 / 50.0 - 10.0);
    let start = [1.0, 0.1, 0.2, 0.3, 0.05].map(|mass| Body { place: three(), speed: three().map(|v| v / 20.0), mass });
    Ok(Box::new(move || {
        let mut bodies = black_box(start);
        (0..STEPS).for_each(|_| step(&mut bodies));
        Ok(bodies.iter().flat_map(|body| body.place).fold(0, |sum: u64, value| sum.rotate_left(7) ^ value.to_bits()))
    }))
}

fn step(bodies: &mut [Body; 5]) {
    const TIME: f64 = 0.01;
    for one in 0..bodies.len() {
        for other in one + 1..bodies.len() {
            let between: [f64; 3] = std::array::from_fn(|axis| bodies[one].place[axis] - bodies[other].place[axis]);
            let square = between.iter().map(|value| value * value).sum::<f64>() + 0.01;
            let pull = TIME / (square * square.sqrt());
            let masses = (bodies[one].mass, bodies[other].mass);
            for (axis, distance) in between.iter().enumerate() {
                bodies[one].speed[axis] -= distance * masses.1 * pull;
                bodies[other].speed[axis] += distance * masses.0 * pull;
            }
        }
    }
    for body in bodies {
        for (place, speed) in body.place.iter_mut().zip(body.speed) {
            *place += TIME * speed;
        }
    }
}

const FLOATS: usize = 4096;
const FACTOR: f32 = 3.0;

/// `y = factor * x + y`, then the sum of `x * y`.
type Kernel = fn(f32, &[f32], &mut [f32]) -> f32;

/// Floats from one vector's start to the next one's: more than a vector has. Where two begin at nearly the same place of
/// their pages, processors take stores to the one for stores to the other, and that is what is measured.
const STRIDE: usize = FLOATS + 352;

fn simd(kernel: Kernel) -> io::Result<Unit> {
    let mut numbers = Numbers(37);
    // At most 4096 * 7 * 28 = 802816 in all: exact in an f32, in whatever order it is summed up.
    let mut room: Vec<f32> = (0..3 * STRIDE).map(|_| numbers.below(8) as f32).collect();
    Ok(Box::new(move || {
        let (given, y) = room.split_at_mut(2 * STRIDE);
        let (x, y) = (&given[..FLOATS], &mut y[..FLOATS]);
        y.copy_from_slice(&given[STRIDE..][..FLOATS]);
        Ok(u64::from(kernel(black_box(FACTOR), x, y).to_bits()))
    }))
}

fn simd_sse() -> io::Result<Unit> {
    // SAFETY: every x86-64 processor has what the function is compiled for.
    simd(|factor, x, y| unsafe { sse(factor, x, y) })
}

fn simd_avx() -> io::Result<Unit> {
    if !is_x86_feature_detected!("avx2") {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this processor has no AVX2"));
    }
    // SAFETY: the processor has what the function is compiled for.
    simd(|factor, x, y| unsafe { avx(factor, x, y) })
}

#[target_feature(enable = "sse")]
fn sse(factor: f32, x: &[f32], y: &mut [f32]) -> f32 {
    const WIDTH: usize = 4;
    let (factor, mut sums): (__m128, __m128) = (_mm_set1_ps(factor), _mm_setzero_ps());
    for (x, y) in x.chunks_exact(WIDTH).zip(y.chunks_exact_mut(WIDTH)) {
        // SAFETY: the chunks have as many elements as a vector; loads and stores need no alignment.
        unsafe {
            _mm_storeu_ps(
                y.as_mut_ptr(),
                _mm_add_ps(_mm_mul_ps(factor, _mm_loadu_ps(x.as_ptr())), _mm_loadu_ps(y.as_ptr())),
            )
        };
    }
    for (x, y) in x.chunks_exact(WIDTH).zip(y.chunks_exact(WIDTH)) {
        // SAFETY: as above.
        sums = unsafe { _mm_add_ps(sums, _mm_mul_ps(_mm_loadu_ps(x.as_ptr()), _mm_loadu_ps(y.as_ptr()))) };
    }
    let mut parts = [0.0; WIDTH];
    // SAFETY: as above.
    unsafe { _mm_storeu_ps(parts.as_mut_ptr(), sums) };
    parts.iter().sum()
}

#[target_feature(enable = "avx2")]
fn avx(factor: f32, x: &[f32], y: &mut [f32]) -> f32 {
    const WIDTH: usize = 8;
    let (factor, mut sums): (__m256, __m256) = (_mm256_set1_ps(factor), _mm256_setzero_ps());
    for (x, y) in x.chunks_exact(WIDTH).zip(y.chunks_exact_mut(WIDTH)) {
        // SAFETY: the chunks have as many elements as a vector; loads and stores need no alignment.
        unsafe {
            _mm256_storeu_ps(
                y.as_mut_ptr(),
                _mm256_add_ps(_mm256_mul_ps(factor, _mm256_loadu_ps(x.as_ptr())), _mm256_loadu_ps(y.as_ptr())),
            )
        };
    }
    for (x, y) in x.chunks_exact(WIDTH).zip(y.chunks_exact(WIDTH)) {
        // SAFETY: as above.
        sums = unsafe { _mm256_add_ps(sums, _mm256_mul_ps(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(y.as_ptr()))) };
    }
    let mut parts = [0.0; WIDTH];
    // SAFETY: as above.
    unsafe { _mm256_storeu_ps(parts.as_mut_ptr(), sums) };
    parts.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_widths_and_plain_arithmetic_agree() {
        let sse = simd_sse().unwrap()().unwrap();
        if let Ok(mut unit) = simd_avx() {
            assert_eq!(unit().unwrap(), sse);
        }
        let mut numbers = Numbers(37);
        let room: Vec<u64> = (0..3 * STRIDE).map(|_| numbers.next() % 8).collect();
        let sum: u64 = room.iter().zip(&room[STRIDE..]).take(FLOATS).map(|(x, y)| x * (3 * x + y)).sum();
        assert_eq!(f32::from_bits(sse as u32), sum as f32);
    }
}
