/* Linear systems with the Jacobian of small programs with any cones, one element at a time: what
   condensed.py describes, in memory of one core, and with as few multiplications as zeros allow.

   Rows of A stand in blocks: one for each polyhedral row, one for the rows of each other cone. A
   block knows the columns in which it has nonzero entries, its support; in the basis of the
   eigenvectors it is stored for these only. As a matrix serves one call, right-hand sides are
   columns of it and no factors are kept. */

#pragma once

#include <stdlib.h>
#include <string.h>

#include "arithmetic.h"

/* Those of condensed.py and least_squares.py. */
#define LARGE_ENOUGH 0.01
#define DOUBTFUL 1e-12

typedef struct {
    int dim, width;      /* numbers of rows, and of columns in the support */
    const int64_t *rows; /* of A */
    const double *all_vectors, *all_values; /* of the first element; no vectors: the axes */
    int64_t stride;      /* numbers from the values of one element to those of the next */
    const double *vectors, *d; /* of this element */
    int *support, *kept; /* kept: where rows stand in the matrix; -1: eliminated */
    double *own, *entries; /* (dim, width), before and after the change of basis */
} Block;

typedef struct {
    int n, m, columns, transpose, count, order, length;
    Block *blocks;
    double **rows; /* of the matrix and its right-hand sides, (order, length) */
    double *matrix, *work, *before, *vector;
} System;

/* ---- The matrix ------------------------------------------------------------------------------ */

/* The support of a block, and its rows of A there. */
static void take_rows(Block *b, const double *A, int n)
{
    b->width = 0;
    for (int j = 0; j < n; j++) {
        int used = 0;
        for (int i = 0; i < b->dim; i++) used |= A[b->rows[i] * n + j] != 0.0;
        if (used) b->support[b->width++] = j;
    }
    for (int i = 0; i < b->dim; i++)
        for (int s = 0; s < b->width; s++)
            b->own[i * b->width + s] = A[b->rows[i] * n + b->support[s]];
}

/* out (dim, width) = V' v, or V v, for the eigenvectors V of a block. */
FOR_EVERY_CPU
static void turn(const double *restrict V, int dim, int width, int forth, const double *restrict v,
                 double *restrict out)
{
    memset(out, 0, sizeof(double) * dim * width);
    for (int i = 0; i < dim; i++)
        for (int k = 0; k < dim; k++) {
            const double factor = V[i * dim + k];
            const double *from = v + (forth ? i : k) * width;
            double *to = out + (forth ? k : i) * width;
            if (factor != 0.0)
                for (int s = 0; s < width; s++) to[s] += factor * from[s];
        }
}

/* Which rows of an element are kept, and the order of its matrix. */
static void choose(System *t)
{
    t->order = t->n;
    for (int i = 0; i < t->count; i++)
        for (int k = 0; k < t->blocks[i].dim; k++)
            t->blocks[i].kept[k] = t->blocks[i].d[k] < LARGE_ENOUGH ? t->order++ : -1;
    t->length = t->order + t->columns;
    for (int i = 0; i < t->order; i++) t->rows[i] = t->matrix + (int64_t)i * t->length;
}

/* What the eliminated rows of a block add to the curvature. */
FOR_EVERY_CPU
static void add_curvature(System *t, const Block *b)
{
    const int width = b->width;
    int any = 0;
    memset(t->work, 0, sizeof(double) * width * width);
    for (int k = 0; k < b->dim; k++) {
        const double weight = (1.0 - b->d[k]) / b->d[k], *restrict row = b->entries + k * width;
        if (b->kept[k] >= 0 || weight == 0.0) continue;
        any = 1;
        for (int s = 0; s < width; s++) {
            const double factor = weight * row[s];
            double *restrict to = t->work + s * width;
            for (int r = 0; r < width; r++) to[r] += factor * row[r];
        }
    }
    for (int s = 0; any && s < width; s++)
        for (int r = 0; r < width; r++)
            t->rows[b->support[s]][b->support[r]] += t->work[s * width + r];
}

static void add_kept(System *t, const Block *b)
{
    for (int k = 0; k < b->dim; k++) {
        const int at = b->kept[k];
        const double *row = b->entries + k * b->width, less = b->d[k] - 1.0;
        if (at < 0) continue;
        t->rows[at][at] = b->d[k];
        for (int s = 0; s < b->width; s++) {
            t->rows[at][b->support[s]] = row[s] * (t->transpose ? less : 1.0);
            t->rows[b->support[s]][at] = row[s] * (t->transpose ? 1.0 : less);
        }
    }
}

static void fill_matrix(System *t, const double *P, char *free_variables)
{
    memset(t->matrix, 0, sizeof(double) * t->order * t->length);
    for (int i = 0; i < t->n; i++) memcpy(t->rows[i], P + (int64_t)i * t->n, sizeof(double) * t->n);
    for (int i = 0; i < t->count; i++) {
        add_curvature(t, t->blocks + i);
        add_kept(t, t->blocks + i);
    }
    for (int i = 0; i < t->n; i++) {
        int any = 0;
        for (int j = 0; j < t->order; j++) any |= t->rows[i][j] != 0.0;
        free_variables[i] = (char)!any;
        if (!any) t->rows[i][i] = 1.0;
    }
}

/* ---- Right-hand sides and solutions ---------------------------------------------------------- */

/* v in the basis of the eigenvectors, block after block. */
static void turn_rhs(const System *t, const double *v, double *out)
{
    const int columns = t->columns;
    for (int i = 0; i < t->count; out += t->blocks[i++].dim * columns) {
        const Block *b = t->blocks + i;
        double *to = b->vectors ? t->before : out;
        for (int k = 0; k < b->dim; k++)
            memcpy(to + k * columns, v + b->rows[k] * columns, sizeof(double) * columns);
        if (b->vectors) turn(b->vectors, b->dim, columns, 1, t->before, out);
    }
}

static void fill_rhs(System *t, const double *u, const char *free_variables)
{
    const int columns = t->columns;
    const double *v = t->vector;
    for (int i = 0; i < t->n; i++)
        memcpy(t->rows[i] + t->order, u + i * columns, sizeof(double) * columns);
    for (int i = 0; i < t->count; i++) {
        const Block *b = t->blocks + i;
        for (int k = 0; k < b->dim; k++, v += columns) {
            const double factor = (t->transpose ? -1.0 : 1.0 - b->d[k]) / b->d[k];
            if (b->kept[k] >= 0) {
                memcpy(t->rows[b->kept[k]] + t->order, v, sizeof(double) * columns);
                continue;
            }
            for (int s = 0; factor != 0.0 && s < b->width; s++) {
                double *to = t->rows[b->support[s]] + t->order;
                for (int c = 0; c < columns; c++)
                    to[c] += b->entries[k * b->width + s] * factor * v[c];
            }
        }
    }
    for (int i = 0; i < t->n; i++)
        if (free_variables[i]) memset(t->rows[i] + t->order, 0, sizeof(double) * columns);
}

/* Elimination with row interchanges, then substitution: the right-hand sides become solutions.
   Whether only rounding may keep the matrix from being singular. */
FOR_EVERY_CPU
static int eliminate(double **rows, int order, int length)
{
    double least = INFINITY, largest = 0.0;
    for (int k = 0; k < order; k++) {
        int best = k;
        for (int i = k + 1; i < order; i++)
            if (fabs(rows[i][k]) > fabs(rows[best][k])) best = i;
        double *restrict pivot = rows[best];
        const double size = fabs(pivot[k]);
        rows[best] = rows[k], rows[k] = pivot;
        if (size < least) least = size;
        if (size > largest) largest = size;
        for (int i = k + 1; i < order; i++) {
            double *restrict row = rows[i];
            if (row[k] == 0.0) continue;
            const double factor = row[k] / pivot[k];
            for (int j = k + 1; j < length; j++) row[j] -= factor * pivot[j];
        }
    }
    for (int k = order - 1; k >= 0; k--)
        for (int c = order; c < length; c++) {
            double sum = rows[k][c];
            for (int j = k + 1; j < order; j++) sum -= rows[k][j] * rows[j][c];
            rows[k][c] = sum / rows[k][k];
        }
    return order && least < DOUBTFUL * largest;
}

static void write_solution(System *t, const char *free_variables, double *x, double *z)
{
    const int columns = t->columns;
    double *v = t->vector;
    for (int i = 0; i < t->n; i++)
        for (int c = 0; c < columns; c++)
            x[i * columns + c] = free_variables[i] ? 0.0 : t->rows[i][t->order + c];
    for (int i = 0; i < t->count; i++) {
        const Block *b = t->blocks + i;
        double *const begin = v;
        for (int k = 0; k < b->dim; k++, v += columns) {
            const double d = b->d[k], share = (t->transpose ? 1.0 - d : -1.0) / d;
            const double *row = b->entries + k * b->width;
            if (b->kept[k] >= 0) {
                memcpy(v, t->rows[b->kept[k]] + t->order, sizeof(double) * columns);
                continue;
            }
            for (int c = 0; c < columns; c++) {
                double sum = 0.0;
                for (int s = 0; share != 0.0 && s < b->width; s++)
                    sum += row[s] * x[b->support[s] * columns + c];
                v[c] = v[c] / d + share * sum;
            }
        }
        const double *found = begin;
        if (b->vectors) turn(b->vectors, b->dim, columns, 0, begin, t->before), found = t->before;
        for (int k = 0; k < b->dim; k++)
            memcpy(z + b->rows[k] * columns, found + k * columns, sizeof(double) * columns);
    }
}

/* ---- Batches --------------------------------------------------------------------------------- */

typedef struct {
    int batch;
    const double *P, *A, *rhs;
    int64_t P_stride, A_stride;
    double *solution;
    char *free_variables, *doubtful;
} Task;

/* The eigenvalues of an element, and its rows in the basis of the eigenvectors. */
static void turn_to(Block *b, int element)
{
    b->d = b->all_values + element * b->stride;
    b->vectors = b->all_vectors ? b->all_vectors + element * b->stride * b->dim : NULL;
    if (b->vectors) turn(b->vectors, b->dim, b->width, 1, b->own, b->entries);
    else memcpy(b->entries, b->own, sizeof(double) * b->width);
}

static void solve_element(System *t, const Task *of, int element, int *ready)
{
    const int64_t size = (int64_t)(t->n + t->m) * t->columns, top = (int64_t)t->n * t->columns;
    const double *u = of->rhs + element * size;
    double *x = of->solution + element * size;
    char *free_variables = of->free_variables + (int64_t)element * t->n;
    for (int i = 0; i < t->count; i++) {
        if (!*ready || of->A_stride)
            take_rows(t->blocks + i, of->A + element * of->A_stride, t->n);
        turn_to(t->blocks + i, element);
    }
    *ready = 1;
    choose(t);
    fill_matrix(t, of->P + element * of->P_stride, free_variables);
    turn_rhs(t, u + top, t->vector);
    fill_rhs(t, u, free_variables);
    of->doubtful[element] = (char)eliminate(t->rows, t->order, t->length);
    write_solution(t, free_variables, x, x + top);
}
