/* A dual active-set method for batches of small, dense, convex quadratic programs

       minimise 1/2 x'P x + q'x  subject to  A x + s = b,  s = 0 (equalities) or s >= 0.

   With P = R'R, v = R'^-1 q and u = R x + v a program is the projection of a point on a polyhedron:
   minimise 1/2 |u|^2 subject to M u <= d, M = A R^-1, d = b + M v, whose rows are scaled to length
   one. Its multipliers maximise the dual function, on a set W of rows that changes by one row at a
   time (Goldfarb and Idnani 1983, Arnstrom, Bemporad and Axehill 2022); where to begin is guessed
   by exchanging all wrong rows at once (Kunisch and Rendl 2003). The matrix M_W M_W' is kept as
   L D L'. Equalities are in W from the beginning and are never dropped.

   Where P is singular (linear programs among them), a term 1/2 (x - c)'r (x - c) with a diagonal r
   is added, and c moved to the solution until it stays there (the proximal-point method), which
   takes a few turns only, each from the set W of the last. Centres that go on and on in one
   direction show that there is no minimum. */
#pragma once

#include <time.h>

#include "solution.h"

/* What becomes of an element; the numbers are known to dual_active_set.py. */
enum {
    SOLVED,
    INFEASIBLE,
    UNBOUNDED,
    INACCURATE,
    NOT_CONVEX,
    TOO_MANY_STEPS,
    TOO_LONG,
    GOING_ON
};

/* Multiples of rows that are smaller than this are rounding where another row depends on them. */
#define SHARE 1e-9
/* How many times all wrong rows are exchanged at once. */
#define EXCHANGES 8
/* Steps between looks at the clock. */
#define LOOK 16
/* How many turns proximal terms get; how well the optimality conditions of the program itself have
   to hold to end at once, and when they get no better. */
#define TURNS 100
#define STATIONARY 1e-13
#define NEARLY_STATIONARY 1e-9

/* Equalities into W; which of the implied ones contradicts the others, or -1. */
STEP int take_equalities(Work *w, double tolerance)
{
    clear(w);
    for (int j = 0; j < w->equalities; j++) {
        if (add(w, j)) continue;
        double left = w->d[j], size = fabs(left);
        solve_factored(w, w->z, 1);
        for (int i = 0; i < w->k; i++) {
            const double term = w->z[i] * w->d[w->W[i]];
            left -= term;
            size += fabs(term);
        }
        if (fabs(left) > 1e4 * tolerance * size) return j;
    }
    return -1;
}

/* The rows that `wrong` names into W, too, with the best multipliers. */
INLINE void take_rows(Work *w)
{
    for (int j = w->equalities; j < w->m; j++)
        if (w->wrong[j]) add(w, j);
    find_target(w);
    memcpy(w->lambda, w->target, w->k * sizeof(double));
}

/* Exchange all rows with a wrong sign at once, some times; whether that led to the solution. */
STEP int exchange(Work *w, const double *start, double tolerance)
{
    for (int j = 0; j < w->m; j++) w->wrong[j] = start ? start[j] > 0.0 : w->d[j] < 0.0;
    for (int turn = 0; turn < EXCHANGES; turn++) {
        take_equalities(w, tolerance);
        take_rows(w);
        const double size = find_slack(w);
        int changes = 0;
        for (int j = w->equalities; j < w->m; j++) {
            const int inside = w->place[j] >= 0;
            const int next = inside ? w->lambda[w->place[j]] > 0.0
                                    : w->slack[j] < -tolerance * size;
            changes += next != inside;
            w->wrong[j] = (char)next;
        }
        if (!changes) return 1;
    }
    for (int i = 0; i < w->k; i++)
        if (w->W[i] >= w->equalities) w->lambda[i] = LARGER(w->lambda[i], 0.0);
    return 0;
}

/* The place in W whose multiplier reaches zero first on the way to `to`, or -1. */
INLINE int first_blocking(const Work *w, const double *from, const double *to, double *share)
{
    int at = -1;
    double worst = 0.0;
    *share = 1.0;
    for (int i = 0; i < w->k; i++) {
        if (w->W[i] < w->equalities || !(to[i] < 0.0)) continue;
        const double reach = from[i] / (from[i] - to[i]);
        if (at < 0 || reach < *share || (reach == *share && to[i] < worst)) {
            at = i;
            *share = reach;
            worst = to[i];
        }
    }
    return at;
}

/* Row j depends on W: multipliers can grow along z without moving u. Makes room for j in W;
   whether that is possible. If not, the growing multipliers show that there is no solution. */
INLINE int make_room(Work *w, int j)
{
    double *ray = w->target, reach = INFINITY;
    int at = -1;
    memcpy(ray, w->z, w->k * sizeof(double));
    solve_factored(w, ray, 1);
    for (int i = 0; i < w->k; i++) {
        if (w->W[i] < w->equalities || !(ray[i] > SHARE)) continue;
        if (w->lambda[i] < reach * ray[i]) {
            reach = w->lambda[i] / ray[i];
            at = i;
        }
    }
    if (at < 0) return 0;
    for (int i = 0; i < w->k; i++) w->lambda[i] -= reach * ray[i];
    drop(w, at);
    if (add(w, j)) w->lambda[w->k - 1] = reach;
    return 1;
}

/* y = multipliers that prove that rows W and j have no common point. */
INLINE void certify(Work *w, int j)
{
    double largest = w->unit[j], sign = 1.0;
    double value = w->d[j];
    memset(w->y, 0, w->m * sizeof(double));
    w->y[j] = w->unit[j];
    for (int i = 0; i < w->k; i++) {
        if (!(fabs(w->target[i]) > SHARE)) continue;
        w->y[w->W[i]] = -w->target[i] * w->unit[w->W[i]];
        value -= w->target[i] * w->d[w->W[i]];
        largest = LARGER(largest, fabs(w->y[w->W[i]]));
    }
    if (value > 0.0) sign = -1.0; /* only where all rows are equalities */
    for (int i = 0; i < w->m; i++) w->y[i] *= sign / largest;
}

INLINE double now(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The largest slack of a row in W, which only rounding keeps from zero. */
INLINE double off_rows(const Work *w)
{
    double worst = 0.0;
    for (int i = 0; i < w->k; i++) worst = LARGER(worst, fabs(w->slack[w->W[i]]));
    return worst;
}

/* Multipliers once more, from what they left of the slacks of W, where M_W M_W' is nearly singular.
   Whether a row leaves W because its multiplier turned out to be negative. */
INLINE int drop_after_correction(Work *w)
{
    int worst = -1;
    for (int turn = 0; turn < CORRECTIONS; turn++) {
        for (int i = 0; i < w->k; i++) w->z[i] = -w->slack[w->W[i]];
        solve_factored(w, w->z, 0);
        for (int i = 0; i < w->k; i++) w->lambda[i] += w->z[i];
        find_slack(w);
    }
    for (int i = 0; i < w->k; i++)
        if (w->W[i] >= w->equalities && w->lambda[i] < (worst < 0 ? 0.0 : w->lambda[worst]))
            worst = i;
    if (worst < 0) return 0;
    for (int i = 0; i < w->k; i++)
        if (w->W[i] >= w->equalities) w->lambda[i] = LARGER(w->lambda[i], 0.0);
    drop(w, worst);
    return 1;
}

/* From multipliers that are nonnegative on W to the best ones. */
STEP int iterate(Work *w, const Batch *batch, double until, int64_t *steps)
{
    for (;; ++*steps) {
        if (*steps >= batch->limit) return TOO_MANY_STEPS;
        if (*steps % LOOK == 0 && now() > until) return TOO_LONG;
        double share;
        find_target(w);
        const int blocking = first_blocking(w, w->lambda, w->target, &share);
        if (blocking >= 0) {
            for (int i = 0; i < w->k; i++) w->lambda[i] += share * (w->target[i] - w->lambda[i]);
            drop(w, blocking);
            continue;
        }
        memcpy(w->lambda, w->target, w->k * sizeof(double));
        const double least = -batch->tolerance * find_slack(w);
        if (off_rows(w) > -least && drop_after_correction(w)) continue;
        int worst = -1;
        for (int j = w->equalities; j < w->m; j++)
            if (w->place[j] < 0 && w->slack[j] < (worst < 0 ? least : w->slack[worst])) worst = j;
        if (worst < 0) return SOLVED;
        if (!add(w, worst) && !make_room(w, worst)) {
            certify(w, worst);
            return INFEASIBLE;
        }
    }
}

/* After a turn of the proximal-point method: keep the best answer, move the centre, or end. */
INLINE int next_turn(Work *w, const Batch *batch, int element, double *best)
{
    find_solution(w);
    const double before = *best, found = violation(w);
    if (found < before) {
        *best = found;
        keep(w, batch, element);
    }
    if (*best <= STATIONARY || (*best <= NEARLY_STATIONARY && found >= before / 2)) return SOLVED;
    find_solution(w); /* what answer() made of it need not be feasible */
    for (int j = 0; j < w->n; j++) {
        w->change[j] = w->x[j] - w->c[j];
        w->c[j] = w->x[j];
    }
    if (is_ray(w)) {
        memcpy(batch->x + (int64_t)element * w->n, w->change, w->n * sizeof(double));
        return UNBOUNDED;
    }
    take_vectors(w);
    return GOING_ON;
}

STEP int solve_element(Work *w, const Batch *batch, int element, int64_t *steps)
{
    const double until = batch->seconds > 0.0 ? now() + batch->seconds : INFINITY;
    const double *start = batch->start ? batch->start + (int64_t)element * w->m : NULL;
    double best = INFINITY;
    w->q = batch->q + (int64_t)element * w->n;
    w->b = batch->b + (int64_t)element * w->m;
    memset(w->c, 0, w->n * sizeof(double));
    take_vectors(w);
    const int contradiction = take_equalities(w, batch->tolerance);
    if (contradiction >= 0) {
        memcpy(w->target, w->z, w->k * sizeof(double));
        certify(w, contradiction);
        return INFEASIBLE;
    }
    int outcome = exchange(w, start, batch->tolerance) ? SOLVED : GOING_ON;
    for (int turn = 0; turn < TURNS; turn++) {
        if (outcome == GOING_ON) outcome = iterate(w, batch, until, steps);
        if (outcome != SOLVED) return outcome;
        refactorise(w);
        if (!w->is_proximal) {
            find_solution(w);
            const double found = violation(w);
            keep(w, batch, element);
            return found <= NEARLY_STATIONARY ? SOLVED : INACCURATE;
        }
        outcome = next_turn(w, batch, element, &best);
        if (outcome != GOING_ON) return outcome;
        ++*steps;
    }
    return TOO_MANY_STEPS;
}
