/* From W and its multipliers to x, y and s, and how well these solve the program. */
#pragma once

#include "rows.h"

/* How often a solution is corrected by what it leaves of the optimality conditions. */
#define CORRECTIONS 2
/* What the terms of these count at least. */
#define SMALLEST 1e-3
/* How well a direction of unboundedness has to be one. */
#define RAY 1e-10

/* Factors of M_W M_W' anew: those that were changed many times are less exact. */
STEP void refactorise(Work *w)
{
    const int k = w->k;
    memcpy(w->spare, w->W, k * sizeof(int));
    clear(w);
    for (int i = 0; i < k; i++) add(w, w->spare[i]);
    find_target(w);
    memcpy(w->lambda, w->target, w->k * sizeof(double));
}

/* x, y of the rows in W, by a step of Newton's method from x and y. */
STEP void correct(Work *w)
{
    const int n = w->n, k = w->k, lm = w->lm;
    for (int j = 0; j < n; j++)
        w->g[j] = w->q[j] + dot(w->P + (int64_t)j * w->ln, w->x, 0, n)
                  + dot(w->At + (int64_t)j * lm, w->y, 0, w->m);
    forward(w, w->g);
    for (int i = 0; i < lm; i++) w->rp[i] = 0.0;
    combine(1.0, w->rp, w->At, lm, w->x, 1, n, 0, lm);
    for (int i = 0; i < lm; i++) w->slack[i] = 0.0;
    combine(1.0, w->slack, w->Mt, lm, w->g, 1, n, 0, lm);
    for (int i = 0; i < k; i++) {
        const int row = w->W[i];
        w->z[i] = w->unit[row] * (w->rp[row] - w->b[row]) - w->slack[row];
    }
    solve_factored(w, w->z, 0);
    for (int j = 0; j < n; j++) {
        const double *column = w->Mt + (int64_t)j * lm;
        double change = w->g[j];
        for (int i = 0; i < k; i++) change += column[w->W[i]] * w->z[i];
        w->change[j] = -change;
    }
    backward(w, w->change);
    for (int j = 0; j < n; j++) w->x[j] += w->change[j];
    for (int i = 0; i < k; i++) w->y[w->W[i]] += w->unit[w->W[i]] * w->z[i];
}

/* rp = A x. */
INLINE void find_activity(Work *w)
{
    for (int i = 0; i < w->lm; i++) w->rp[i] = 0.0;
    combine(1.0, w->rp, w->At, w->lm, w->x, 1, w->n, 0, w->lm);
}

/* x, y and s of the rows in W, from any x and y. */
INLINE void answer(Work *w)
{
    memset(w->y, 0, w->lm * sizeof(double));
    for (int i = 0; i < w->k; i++) w->y[w->W[i]] = w->unit[w->W[i]] * w->lambda[i];
    for (int turn = 0; turn < CORRECTIONS; turn++) correct(w);
    find_activity(w);
    for (int i = 0; i < w->m; i++) {
        const int inside = i < w->equalities || w->place[i] >= 0;
        if (i >= w->equalities) w->y[i] = LARGER(w->y[i], 0.0);
        w->s[i] = inside ? 0.0 : LARGER(w->b[i] - w->rp[i], 0.0);
    }
}

INLINE void keep(const Work *w, const Batch *batch, int element)
{
    memcpy(batch->x + (int64_t)element * w->n, w->x, w->n * sizeof(double));
    memcpy(batch->y + (int64_t)element * w->m, w->y, w->m * sizeof(double));
    memcpy(batch->s + (int64_t)element * w->m, w->s, w->m * sizeof(double));
}

/* x = R^-1 (u - v), the solution for the multipliers on W. */
INLINE void find_solution(Work *w)
{
    for (int j = 0; j < w->n; j++) {
        const double *column = w->Mt + (int64_t)j * w->lm;
        double u = -w->v[j];
        for (int i = 0; i < w->k; i++) u -= column[w->W[i]] * w->lambda[i];
        w->x[j] = u;
    }
    backward(w, w->x);
}

/* How far x, y and s of the rows in W are from solving the program without the proximal term: the
   largest violation of an optimality condition, relative to its terms. */
STEP double violation(Work *w)
{
    double worst = 0.0;
    answer(w);
    for (int j = 0; j < w->n; j++) {
        const double *row = w->P + (int64_t)j * w->ln, *column = w->At + (int64_t)j * w->lm;
        const double sum = w->q[j] + dot(row, w->x, 0, w->n) + dot(column, w->y, 0, w->m);
        double size = LARGER(fabs(w->q[j]), SMALLEST);
        size = LARGER(size, largest_term(row, w->x, w->n));
        size = LARGER(size, largest_term(column, w->y, w->m));
        if (!(fabs(sum) <= worst * size)) worst = fabs(sum) / size;
    }
    for (int i = 0; i < w->m; i++) {
        const double size = LARGER(LARGER(fabs(w->b[i]), fabs(w->rp[i])), SMALLEST);
        const double error = fabs(w->rp[i] + w->s[i] - w->b[i]);
        if (!(error <= worst * size)) worst = error / size;
    }
    return isfinite(dot(w->x, w->x, 0, w->n)) ? worst : INFINITY;
}

/* Whether the objective falls without end along the last change, from where x is feasible. */
INLINE int is_ray(Work *w)
{
    double slope = 0.0, steepest = 0.0;
    const double length = largest_entry(w->change, w->n);
    if (!(length > 0.0)) return 0;
    for (int j = 0; j < w->n; j++) {
        w->change[j] /= length;
        slope += w->q[j] * w->change[j];
        steepest += fabs(w->q[j] * w->change[j]);
    }
    if (!(slope < -1e-6 * steepest)) return 0;
    const double curvature = RAY * largest_entry(w->P, (int64_t)w->n * w->ln);
    for (int j = 0; j < w->n; j++)
        if (!(fabs(dot(w->P + (int64_t)j * w->ln, w->change, 0, w->n)) <= curvature)) return 0;
    for (int i = 0; i < w->lm; i++) w->rp[i] = 0.0;
    combine(1.0, w->rp, w->At, w->lm, w->change, 1, w->n, 0, w->lm);
    for (int i = 0; i < w->m; i++) {
        const double rate = i < w->equalities ? fabs(w->rp[i]) : w->rp[i];
        if (!(rate <= RAY * w->n)) return 0;
    }
    return 1;
}
