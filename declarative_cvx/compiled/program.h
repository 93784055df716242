/* One program of a batch, in the form in which the method works on it. */
#pragma once

#include <stdlib.h>
#include <string.h>

#include "arithmetic.h"

/* A pivot that is smaller than this, relative to the diagonal, may be rounding. */
#define PIVOT 1e-11
/* Proximal terms: r relative to the diagonal of P; where that is 0, to its largest entry or 1. */
#define PROXIMAL 1e-5

typedef struct {
    int n, m, equalities, batch, shared;
    int64_t P_stored, A_stored, P_stride, A_stride;
    const int64_t *P_rows, *P_cols, *A_rows, *A_cols;
    const double *P, *q, *A, *b, *start;
    double *x, *y, *s;
    int64_t *outcome, *steps;
    double tolerance, seconds;
    int64_t limit;
} Batch;

typedef struct {
    int n, m, ln, lm, equalities; /* ln, lm: lengths of rows in memory */
    int k;                        /* rows in W */
    double *P, *At, *R, *Mt, *G;  /* n x ln, n x lm, n x ln, n x lm, m x lm */
    double *L, *D;                /* factors of M_W M_W', (n + 1) x (n + 1) */
    double *v, *c, *x, *g, *change, *proximal; /* ln; g: of the dual condition; proximal: r */
    double *unit, *d, *slack, *y, *s, *rp; /* lm; unit: what rows of A R^-1 are multiplied with */
    double *lambda, *target, *z;  /* k */
    int is_proximal;              /* whether P is singular */
    const double *q, *b;
    int *W, *place, *known;       /* rows in W; places in it or -1; which rows of G are computed */
    int *spare;                   /* m */
    char *wrong;                  /* m; rows that are to be in W next */
    double *extra;                /* what else a task keeps */
    void *memory;
} Work;

/* P + r I = R'R; whether it is positive definite. */
STEP int factorise(Work *w)
{
    const int n = w->n, ln = w->ln;
    for (int i = 0; i < n; i++) {
        double *row = w->R + (int64_t)i * ln;
        const int from = i & ~(LANES - 1);
        memcpy(row + from, w->P + (int64_t)i * ln + from, (ln - from) * sizeof(double));
        row[i] += w->proximal[i];
        const double diagonal = row[i];
        combine(-1.0, row, w->R, ln, w->R + i, ln, i, from, ln);
        for (int c = 0; c < i; c++) row[c] = 0.0;
        if (!(row[i] > PIVOT * diagonal)) return 0;
        const double pivot = sqrt(row[i]);
        for (int c = i; c < n; c++) row[c] /= pivot;
    }
    return 1;
}

/* v = R'^-1 v. */
INLINE void forward(const Work *w, double *v)
{
    for (int j = 0; j < w->n; j++) {
        const double *row = w->R + (int64_t)j * w->ln, pivot = v[j] / row[j];
        v[j] = pivot;
        for (int c = j + 1; c < w->n; c++) v[c] -= pivot * row[c];
    }
}

/* v = R^-1 v. */
INLINE void backward(const Work *w, double *v)
{
    for (int j = w->n - 1; j >= 0; j--) {
        const double *row = w->R + (int64_t)j * w->ln;
        v[j] = (v[j] - dot(row, v, j + 1, w->n)) / row[j];
    }
}

/* M = A R^-1, stored by columns, and its rows scaled to length one. */
STEP void project_rows(Work *w)
{
    const int n = w->n, lm = w->lm;
    for (int i = 0; i < lm; i++) w->unit[i] = 0.0;
    for (int j = 0; j < n; j++) {
        double *column = w->Mt + (int64_t)j * lm;
        memcpy(column, w->At + (int64_t)j * lm, lm * sizeof(double));
        combine(-1.0, column, w->Mt, lm, w->R + j, w->ln, j, 0, lm);
        const double pivot = w->R[(int64_t)j * w->ln + j];
        for (int i = 0; i < lm; i++) {
            column[i] /= pivot;
            w->unit[i] += column[i] * column[i];
        }
    }
    for (int i = 0; i < lm; i++) w->unit[i] = w->unit[i] > 0.0 ? 1.0 / sqrt(w->unit[i]) : 0.0;
    for (int j = 0; j < n; j++)
        for (int i = 0; i < lm; i++) w->Mt[(int64_t)j * lm + i] *= w->unit[i];
    memset(w->known, 0, w->m * sizeof(int));
}

INLINE void scatter(double *out, int64_t size, const double *values, int64_t stored,
                    const int64_t *slow, const int64_t *fast, int64_t length)
{
    memset(out, 0, size * sizeof(double));
    for (int64_t k = 0; k < stored; k++) out[slow[k] * length + fast[k]] = values[k];
}


/* As `factorise`, with a proximal term where P is singular; whether P is positive semidefinite. */
INLINE int factorise_any(Work *w)
{
    memset(w->proximal, 0, w->ln * sizeof(double));
    w->is_proximal = !factorise(w);
    if (!w->is_proximal) return 1;
    const double largest = largest_entry(w->P, (int64_t)w->n * w->ln);
    for (int j = 0; j < w->n; j++) {
        const double own = w->P[(int64_t)j * w->ln + j];
        w->proximal[j] = PROXIMAL * (own > 0.0 ? own : largest > 0.0 ? largest : 1.0);
    }
    return factorise(w);
}

/* Everything that depends on P and A only; whether P is positive semidefinite. */
INLINE int take_matrices(Work *w, const Batch *batch, int element)
{
    scatter(w->P, (int64_t)w->n * w->ln, batch->P + element * batch->P_stride, batch->P_stored,
            batch->P_rows, batch->P_cols, w->ln);
    scatter(w->At, (int64_t)w->n * w->lm, batch->A + element * batch->A_stride, batch->A_stored,
            batch->A_cols, batch->A_rows, w->lm);
    if (!factorise_any(w)) return 0;
    project_rows(w);
    return 1;
}

/* v and d. */
STEP void take_vectors(Work *w)
{
    for (int j = 0; j < w->n; j++) w->v[j] = w->q[j] - w->proximal[j] * w->c[j];
    forward(w, w->v);
    for (int i = 0; i < w->lm; i++) w->d[i] = i < w->m ? w->unit[i] * w->b[i] : 0.0;
    combine(1.0, w->d, w->Mt, w->lm, w->v, 1, w->n, 0, w->lm);
}

/* Row j of M M', computed when it is first asked for. */
INLINE const double *gram(Work *w, int j)
{
    double *row = w->G + (int64_t)j * w->lm;
    if (!w->known[j]) {
        for (int i = 0; i < w->lm; i++) row[i] = 0.0;
        combine(1.0, row, w->Mt, w->lm, w->Mt + j, w->lm, w->n, 0, w->lm);
        w->known[j] = 1;
    }
    return row;
}

INLINE int64_t rounded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Memory for programs of n variables and m rows, and so many numbers more; whether there was any. */
static int reserve(Work *w, int64_t n, int64_t m, int equalities, int64_t extra)
{
    const int64_t ln = rounded(n), lm = rounded(m);
    const int64_t square = rounded((n + 1) * (n + 1)), k = rounded(n + 1);
    const int64_t sizes[] = {n * ln, n * lm, n * ln, n * lm, m * lm, square, k,  ln, ln, ln, ln,
                             ln,     ln,     lm,     lm,     lm,     lm,     lm, lm, k,  k,  k,  extra};
    double **arrays[] = {&w->P, &w->At, &w->R,    &w->Mt, &w->G,     &w->L, &w->D,      &w->v,
                         &w->c, &w->x,  &w->g, &w->change, &w->proximal, &w->unit, &w->d,
                         &w->slack, &w->y,
                         &w->s, &w->rp, &w->lambda, &w->target, &w->z, &w->extra};
    const int count = sizeof(sizes) / sizeof(*sizes);
    int64_t total = LANES;
    memset(w, 0, sizeof(*w));
    for (int i = 0; i < count; i++) total += sizes[i];
    const size_t bytes = total * sizeof(double) + (3 * m + n + 1) * sizeof(int) + m;
    w->memory = calloc(bytes, 1);
    if (!w->memory) return 0;
    double *at = (double *)(((uintptr_t)w->memory + 63) & ~(uintptr_t)63);
    for (int i = 0; i < count; at += sizes[i++]) *arrays[i] = at;
    w->W = (int *)at;
    w->place = w->W + n + 1;
    w->known = w->place + m;
    w->spare = w->known + m;
    w->wrong = (char *)(w->spare + m);
    w->n = (int)n;
    w->m = (int)m;
    w->ln = (int)ln;
    w->lm = (int)lm;
    w->equalities = equalities;
    return 1;
}
