/* Products of small matrices and vectors, compiled for the registers of every kind of processor. */
#pragma once

#include <math.h>
#include <stdint.h>

/* Versions of the arithmetic for wider registers, chosen when the library is loaded. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif
/* A function that is compiled once, for every kind of processor, and not into its callers. */
#if defined(__GNUC__)
#define STEP FOR_EVERY_CPU static __attribute__((noinline))
#else
#define STEP static
#endif
#define LARGER(a, b) ((a) > (b) ? (a) : (b))

/* So many numbers stand in one register of the widest kind; rows of matrices in memory begin at
   multiples of it. */
#define LANES 8
typedef double Lanes __attribute__((vector_size(LANES * sizeof(double)), may_alias));

typedef Lanes LooseLanes __attribute__((aligned(8), may_alias));

/* Lane number `i` of a row, and the lane that begins at any entry. */
#define LANE(row, i) (((const Lanes *)(row))[i])
#define ANYWHERE(row, entry) (*(const LooseLanes *)((row) + (entry)))

/* The combination of rows with coefficients coef[0], coef[step], ..., for the columns of `count`
   lanes, at most four. Even and odd rows are summed separately, so that no sum waits for the last.
   `count` is known when this is compiled. */
INLINE void combine_lanes(const int count, double sign, Lanes *restrict out,
                          const double *restrict rows, int64_t length,
                          const double *restrict coef, int64_t step, int terms)
{
    Lanes even[4] = {{0.0}}, odd[4] = {{0.0}};
    int k = 0;
    for (; k + 1 < terms; k += 2) {
        const double *row = rows + k * length, *next = row + length;
        const double factor = coef[k * step], other = coef[(k + 1) * step];
        even[0] += factor * LANE(row, 0), odd[0] += other * LANE(next, 0);
        if (count > 1) even[1] += factor * LANE(row, 1), odd[1] += other * LANE(next, 1);
        if (count > 2) even[2] += factor * LANE(row, 2), odd[2] += other * LANE(next, 2);
        if (count > 3) even[3] += factor * LANE(row, 3), odd[3] += other * LANE(next, 3);
    }
    if (k < terms) {
        const double *row = rows + k * length, factor = coef[k * step];
        even[0] += factor * LANE(row, 0);
        if (count > 1) even[1] += factor * LANE(row, 1);
        if (count > 2) even[2] += factor * LANE(row, 2);
        if (count > 3) even[3] += factor * LANE(row, 3);
    }
    out[0] += sign * (even[0] + odd[0]);
    if (count > 1) out[1] += sign * (even[1] + odd[1]);
    if (count > 2) out[2] += sign * (even[2] + odd[2]);
    if (count > 3) out[3] += sign * (even[3] + odd[3]);
}

/* out -= or += a combination of rows, for the columns from `from` to `to`, multiples of LANES. */
INLINE void combine(double sign, double *restrict out, const double *restrict rows, int64_t length,
                    const double *restrict coef, int64_t step, int terms, int from, int to)
{
    int c = from;
    for (; c + 4 * LANES <= to; c += 4 * LANES)
        combine_lanes(4, sign, (Lanes *)(out + c), rows + c, length, coef, step, terms);
    switch ((to - c) / LANES) {
    case 3: combine_lanes(3, sign, (Lanes *)(out + c), rows + c, length, coef, step, terms); break;
    case 2: combine_lanes(2, sign, (Lanes *)(out + c), rows + c, length, coef, step, terms); break;
    case 1: combine_lanes(1, sign, (Lanes *)(out + c), rows + c, length, coef, step, terms); break;
    }
}

INLINE double dot(const double *restrict a, const double *restrict b, int from, int to)
{
    Lanes even = {0.0}, odd = {0.0};
    double rest = 0.0;
    int i = from;
    for (; i + 2 * LANES <= to; i += 2 * LANES) {
        even += ANYWHERE(a, i) * ANYWHERE(b, i);
        odd += ANYWHERE(a, i + LANES) * ANYWHERE(b, i + LANES);
    }
    for (; i + LANES <= to; i += LANES) even += ANYWHERE(a, i) * ANYWHERE(b, i);
    for (; i < to; i++) rest += a[i] * b[i];
    even += odd;
    return rest + (((even[0] + even[1]) + (even[2] + even[3]))
                   + ((even[4] + even[5]) + (even[6] + even[7])));
}

INLINE double largest_lane(const double *lanes)
{
    double largest = 0.0;
    for (int t = 0; t < LANES; t++) largest = LARGER(largest, lanes[t]);
    return largest;
}

/* The largest absolute value; numbers that are not finite may be passed over. */
INLINE double largest_entry(const double *values, int64_t count)
{
    double largest[LANES] = {0.0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int t = 0; t < LANES; t++) largest[t] = LARGER(fabs(values[i + t]), largest[t]);
    for (int t = 0; i < count; i++, t++) largest[t] = LARGER(fabs(values[i]), largest[t]);
    return largest_lane(largest);
}

/* The largest absolute value of the terms of a'b. */
INLINE double largest_term(const double *restrict a, const double *restrict b, int count)
{
    double largest[LANES] = {0.0};
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int t = 0; t < LANES; t++) largest[t] = LARGER(fabs(a[i + t] * b[i + t]), largest[t]);
    for (int t = 0; i < count; i++, t++) largest[t] = LARGER(fabs(a[i] * b[i]), largest[t]);
    return largest_lane(largest);
}
