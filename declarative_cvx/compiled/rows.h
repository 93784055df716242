/* The set W of rows that hold with equality, the factors of M_W M_W', multipliers and slacks. */
#pragma once

#include "program.h"

/* Square of the sine of the angle to the rows in W from which a row depends on them. */
#define DEPENDENT 1e-13

#define ROW(w, i) ((w)->L + (int64_t)(i) * ((w)->n + 1))

/* z = coefficients with which L z = (M_W m_j); returns the square of the sine of j to W. */
INLINE double append_row(Work *w, int j, double *z)
{
    const double *g = gram(w, j);
    double left = g[j];
    for (int i = 0; i < w->k; i++) {
        z[i] = g[w->W[i]] - dot(ROW(w, i), z, 0, i);
        left -= z[i] * z[i] / w->D[i];
    }
    return left;
}

/* Take row j into W unless it depends on the rows there; z tells how. */
STEP int add(Work *w, int j)
{
    const double left = w->k < w->n ? append_row(w, j, w->z) : (append_row(w, j, w->z), 0.0);
    if (!(left > DEPENDENT)) return 0;
    double *row = ROW(w, w->k);
    for (int i = 0; i < w->k; i++) row[i] = w->z[i] / w->D[i];
    w->D[w->k] = left;
    w->lambda[w->k] = 0.0;
    w->place[j] = w->k;
    w->W[w->k++] = j;
    return 1;
}

/* Take the row at a place of W out of it: its column of L moves into the rows below. */
STEP void drop(Work *w, int at)
{
    double scale = w->D[at], *z = w->z;
    w->place[w->W[at]] = -1;
    for (int i = at + 1; i < w->k; i++) {
        double *row = ROW(w, i);
        z[i - 1] = row[at];
        memmove(ROW(w, i - 1), row, at * sizeof(double));
        memmove(ROW(w, i - 1) + at, row + at + 1, (i - at - 1) * sizeof(double));
        w->W[i - 1] = w->W[i];
        w->place[w->W[i]] = i - 1;
        w->D[i - 1] = w->D[i];
        w->lambda[i - 1] = w->lambda[i];
    }
    w->k--;
    for (int j = at; j < w->k; j++) {
        const double p = z[j], pivot = w->D[j] + scale * p * p, beta = scale * p / pivot;
        scale *= w->D[j] / pivot;
        w->D[j] = pivot;
        for (int i = j + 1; i < w->k; i++) {
            double *row = ROW(w, i);
            z[i] -= p * row[j];
            row[j] += beta * z[i];
        }
    }
}

INLINE void clear(Work *w)
{
    for (int i = 0; i < w->m; i++) w->place[i] = -1;
    w->k = 0;
}

/* z = (M_W M_W')^-1 z; `halfway` where the forward substitution is done. */
INLINE void solve_factored(const Work *w, double *z, int halfway)
{
    if (!halfway)
        for (int i = 1; i < w->k; i++) z[i] -= dot(ROW(w, i), z, 0, i);
    for (int i = 0; i < w->k; i++) z[i] /= w->D[i];
    for (int i = w->k - 1; i > 0; i--) {
        const double *row = ROW(w, i), value = z[i];
        for (int t = 0; t < i; t++) z[t] -= row[t] * value;
    }
}

/* The multipliers that are best on W: M_W M_W' target = -d_W. */
INLINE void find_target(Work *w)
{
    for (int i = 0; i < w->k; i++) w->target[i] = -w->d[w->W[i]];
    solve_factored(w, w->target, 0);
}

/* slack = d + M M_W' lambda, and by how much slacks may be wrong. */
STEP double find_slack(Work *w)
{
    double size = 0.0;
    for (int i = 0; i < w->lm; i++) w->slack[i] = w->d[i];
    for (int i = 0; i < w->k; i++) {
        const double *row = w->G + (int64_t)w->W[i] * w->lm, factor = w->lambda[i];
        for (int c = 0; c < w->lm; c++) w->slack[c] += factor * row[c];
        size += fabs(factor);
    }
    for (int i = 0; i < w->m; i++) size = LARGER(size, fabs(w->d[i]));
    return size;
}
