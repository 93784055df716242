/* Linear systems with the Jacobian of the optimality conditions of a program, or its transpose.

   J = [[P, A'(D - I)], [A, D]] for a diagonal D of ones and zeros. With W the rows of A where D is
   zero, J (x, z) = (u, v) is

       P x - A_W'z_W = u,   A_W x = v_W,   z = v - A x  elsewhere,

   and in the transposed system

       P x + A_W'z_W = u - (A'v of the other rows),   A_W x = -v_W,   z = v  elsewhere,

   which are the conditions of a quadratic program with the equalities W. Variables that are in none
   of them are put to zero. */
#pragma once

#include "solution.h"

/* How often solutions are corrected where P is singular, and when they are settled. */
#define SYSTEM_TURNS 10
#define SETTLED 1e-12
/* A system whose solution for a random vector of numbers up to 2 is larger is nearly singular. */
#define INFLATED 1e8

typedef struct {
    int n, m, batch, columns, transpose;
    int64_t P_stride, A_stride;
    const double *P, *A, *diagonal, *rhs; /* rhs, solution: (n + m) x columns */
    double *solution;
    char *failed;
} Systems;

/* Factors of P, A_W and M_W M_W'; whether there are any. */
INLINE int take_system(Work *w, const Systems *t, int element)
{
    const double *P = t->P + element * t->P_stride, *A = t->A + element * t->A_stride;
    const double *diagonal = t->diagonal + (int64_t)element * t->m;
    const int n = t->n;
    int k = 0;
    memset(w->At, 0, (int64_t)n * w->lm * sizeof(double));
    for (int i = 0; i < t->m; i++) {
        if (diagonal[i] == 1.0) continue;
        if (diagonal[i] != 0.0 || k == n) return 0;
        for (int j = 0; j < n; j++) w->At[(int64_t)j * w->lm + k] = A[(int64_t)i * n + j];
        w->spare[k++] = i;
    }
    w->m = k;
    for (int j = 0; j < n; j++)
        memcpy(w->P + (int64_t)j * w->ln, P + (int64_t)j * n, n * sizeof(double));
    if (!factorise_any(w)) return 0;
    project_rows(w);
    clear(w);
    for (int i = 0; i < k; i++)
        if (!add(w, i)) return 0;
    return 1;
}

/* Whether no condition contains variable j. */
INLINE int is_free(const Work *w, int j)
{
    return w->P[(int64_t)j * w->ln + j] == 0.0
        && largest_entry(w->P + (int64_t)j * w->ln, w->n) == 0.0
        && largest_entry(w->At + (int64_t)j * w->lm, w->m) == 0.0;
}

/* x and y for the vectors q and b, in v and d; whether they settled. */
STEP int solve_conditions(Work *w)
{
    const int turns = w->is_proximal ? SYSTEM_TURNS : 2;
    memset(w->x, 0, w->ln * sizeof(double));
    memset(w->y, 0, w->lm * sizeof(double));
    w->q = w->v;
    w->b = w->d;
    for (int turn = 0; turn < turns; turn++) {
        correct(w);
        const double size = largest_entry(w->x, w->n), change = largest_entry(w->change, w->n);
        if (turn && change <= SETTLED * LARGER(size, SMALLEST)) return 1;
    }
    return !w->is_proximal;
}

/* Where P is singular: whether the matrix is regular nevertheless. */
INLINE int is_regular(Work *w)
{
    if (!w->is_proximal) return 1;
    uint32_t state = 1;
    for (int j = 0; j < w->n; j++) {
        state = state * 1664525u + 1013904223u;
        const double random = 1.0 + state / 4294967296.0;
        w->v[j] = is_free(w, j) ? 0.0 : random;
    }
    memset(w->d, 0, w->lm * sizeof(double));
    return solve_conditions(w) && largest_entry(w->x, w->n) <= INFLATED;
}

/* q and b of the conditions for a column of the right-hand side. */
INLINE void take_column(Work *w, const Systems *t, int element, const double *u, const double *v)
{
    const double *A = t->A + element * t->A_stride;
    const double *diagonal = t->diagonal + (int64_t)element * t->m;
    const int columns = t->columns;
    for (int j = 0; j < t->n; j++) w->v[j] = -u[(int64_t)j * columns];
    for (int i = 0; t->transpose && i < t->m; i++) {
        const double factor = v[(int64_t)i * columns], *row = A + (int64_t)i * t->n;
        if (diagonal[i] == 0.0 || factor == 0.0) continue;
        for (int j = 0; j < t->n; j++) w->v[j] += factor * row[j];
    }
    for (int j = 0; w->is_proximal && j < t->n; j++)
        if (is_free(w, j)) w->v[j] = 0.0;
    for (int i = 0; i < w->m; i++) {
        const double value = v[(int64_t)w->spare[i] * columns];
        w->d[i] = t->transpose ? -value : value;
    }
}

INLINE void give_column(const Work *w, const Systems *t, int element, const double *v, double *x)
{
    const double *A = t->A + element * t->A_stride;
    const double *diagonal = t->diagonal + (int64_t)element * t->m;
    const int columns = t->columns;
    double *z = x + (int64_t)t->n * columns;
    for (int j = 0; j < t->n; j++) x[(int64_t)j * columns] = w->x[j];
    for (int i = 0; i < t->m; i++) {
        if (diagonal[i] == 0.0) continue;
        const double moved = t->transpose ? 0.0 : dot(A + (int64_t)i * t->n, w->x, 0, t->n);
        z[(int64_t)i * columns] = v[(int64_t)i * columns] - moved;
    }
    for (int i = 0; i < w->m; i++)
        z[(int64_t)w->spare[i] * columns] = t->transpose ? w->y[i] : -w->y[i];
}

/* Whether the system of an element was solved. */
INLINE int solve_columns(Work *w, const Systems *t, int element)
{
    const int64_t size = (int64_t)(t->n + t->m) * t->columns;
    if (!take_system(w, t, element) || !is_regular(w)) return 0;
    for (int column = 0; column < t->columns; column++) {
        const double *u = t->rhs + element * size + column;
        const double *v = u + (int64_t)t->n * t->columns;
        take_column(w, t, element, u, v);
        if (!solve_conditions(w)) return 0;
        give_column(w, t, element, v, t->solution + element * size + column);
    }
    return 1;
}
