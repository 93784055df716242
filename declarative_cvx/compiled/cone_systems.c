/* Linear systems of small programs with any cones for Python: arrays in, arrays out. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cone_systems.h"

enum { P_MATRIX, A_MATRIX, DIAGONAL, RHS, SOLUTION, FREE, DOUBT, BUFFERS };
enum { ROWS, VECTORS, VALUES, EACH };

/* Pieces of a stretch of memory, at multiples of eight bytes; of none, to measure. */
static void *piece(char *memory, size_t *used, size_t bytes)
{
    void *found = memory ? memory + *used : NULL;
    *used += (bytes + 7) / 8 * 8;
    return found;
}

/* Give blocks and system their memory, or measure it. */
static size_t lay_out(System *t, char *memory)
{
    const size_t n = t->n, order = t->n + t->m, number = sizeof(double);
    size_t used = 0, deepest = 1;
    for (int i = 0; i < t->count; i++) {
        Block *b = t->blocks + i;
        if ((size_t)b->dim > deepest) deepest = b->dim;
        b->support = piece(memory, &used, n * sizeof(int));
        b->kept = piece(memory, &used, b->dim * sizeof(int));
        b->own = piece(memory, &used, b->dim * n * number);
        b->entries = piece(memory, &used, b->dim * n * number);
    }
    t->rows = piece(memory, &used, order * sizeof(double *));
    t->matrix = piece(memory, &used, order * (order + t->columns) * number);
    t->work = piece(memory, &used, n * n * number);
    t->before = piece(memory, &used, deepest * t->columns * number);
    t->vector = piece(memory, &used, (size_t)t->m * t->columns * number);
    return used;
}

/* The blocks of polyhedral rows, which come first, and of the parts; whether all fits. */
static int make_blocks(System *t, const Py_buffer *parts, int count, const double *diagonal,
                       int64_t *numbers, int batch)
{
    int curved = 0, at = 0;
    for (int p = 0; p < count; p++) curved += (int)(parts[EACH * p + ROWS].len / 8);
    const int first = t->m - curved;
    if (first < 0) return 0;
    for (; at < first; at++) {
        numbers[at] = at;
        t->blocks[at] = (Block){.dim = 1, .rows = numbers + at, .all_values = diagonal + at,
                                .stride = t->m};
    }
    for (int p = 0; p < count; p++) {
        const Py_buffer *of = parts + EACH * p;
        const int64_t *rows = of[ROWS].buf, each = of[ROWS].len / 8;
        const int dim = of[ROWS].ndim == 2 ? (int)of[ROWS].shape[1] : 0;
        if (dim < 1 || of[VALUES].len / 8 != each * batch
            || of[VECTORS].len / 8 != each * batch * dim)
            return 0;
        for (int64_t c = 0; c < each / dim; c++, at++)
            t->blocks[at] = (Block){.dim = dim, .rows = rows + c * dim, .stride = each,
                                    .all_vectors = (double *)of[VECTORS].buf + c * dim * dim,
                                    .all_values = (double *)of[VALUES].buf + c * dim};
        for (int64_t i = 0; i < each; i++)
            if (rows[i] < 0 || rows[i] >= t->m) return 0;
    }
    t->count = at;
    return 1;
}

static int fits(const Py_buffer *buffer, int64_t each, int64_t batch, int may_be_shared)
{
    const int64_t found = buffer->len / 8;
    return found == each * batch || (may_be_shared && found == each);
}

static int all_fit(const System *t, const Task *of, const Py_buffer *given)
{
    const int64_t n = t->n, m = t->m, size = (n + m) * t->columns;
    return fits(given + P_MATRIX, n * n, of->batch, 1) && fits(given + A_MATRIX, m * n, of->batch, 1)
        && fits(given + DIAGONAL, m, of->batch, 0) && fits(given + RHS, size, of->batch, 0)
        && fits(given + SOLUTION, size, of->batch, 0) && given[FREE].len == of->batch * n
        && given[DOUBT].len == of->batch;
}

/* All elements, each thread with memory of its own; whether there was enough. */
static int solve_all(System *given, const Task *of, int threads)
{
    const size_t blocks = (given->count * sizeof(Block) + 7) / 8 * 8, size = lay_out(given, NULL);
    int enough = 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        System t = *given;
        int ready = 0;
        char *memory = malloc(blocks + size + 8);
        if (!memory) {
            enough = 0;
        } else {
            t.blocks = memcpy(memory, given->blocks, given->count * sizeof(Block));
            lay_out(&t, memory + blocks);
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int element = 0; element < of->batch; element++)
            if (memory) solve_element(&t, of, element, &ready);
        free(memory);
    }
    (void)threads;
    return enough;
}

/* The buffers of the parts, triples of arrays; -1 with an error set. */
static int take_parts(PyObject *parts, Py_buffer *of, int *taken)
{
    for (Py_ssize_t p = 0; p < PyTuple_GET_SIZE(parts); p++) {
        PyObject *triple = PyTuple_GET_ITEM(parts, p);
        if (!PyTuple_Check(triple) || PyTuple_GET_SIZE(triple) != EACH) {
            PyErr_SetString(PyExc_TypeError, "parts are triples of arrays");
            return -1;
        }
        for (int i = 0; i < EACH; i++, ++*taken)
            if (PyObject_GetBuffer(PyTuple_GET_ITEM(triple, i), of + *taken, PyBUF_CONTIG_RO))
                return -1;
    }
    return 0;
}

/* The work on arrays that are known to be there: 1, or 0 with an error set. */
static int solve_arrays(System *t, Task *of, const Py_buffer *given, const Py_buffer *parts,
                        int count, int threads)
{
    int done = 0;
    int64_t *numbers = malloc(sizeof(int64_t) * (t->m + 1));
    t->blocks = malloc(sizeof(Block) * (t->m + 1));
    of->P = given[P_MATRIX].buf, of->A = given[A_MATRIX].buf, of->rhs = given[RHS].buf;
    of->P_stride = given[P_MATRIX].len / 8 == t->n * t->n ? 0 : t->n * t->n;
    of->A_stride = given[A_MATRIX].len / 8 == t->m * t->n ? 0 : t->m * t->n;
    of->solution = given[SOLUTION].buf, of->free_variables = given[FREE].buf;
    of->doubtful = given[DOUBT].buf;
    if (!numbers || !t->blocks) {
        PyErr_NoMemory();
    } else if (!all_fit(t, of, given)
               || !make_blocks(t, parts, count, given[DIAGONAL].buf, numbers, of->batch)) {
        PyErr_SetString(PyExc_ValueError, "arrays of sizes that do not fit each other");
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = solve_all(t, of, threads);
        Py_END_ALLOW_THREADS
        if (!done) PyErr_NoMemory();
    }
    free(numbers);
    free(t->blocks);
    return done;
}

static PyObject *solve(PyObject *self, PyObject *args)
{
    System t = {0};
    Task of = {0};
    Py_buffer given[BUFFERS];
    PyObject *parts;
    int taken = 0, done = 0, threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "iiiipiy*y*y*O!y*w*w*w*", &of.batch, &t.n, &t.m, &t.columns,
                          &t.transpose, &threads, given + P_MATRIX, given + A_MATRIX, given + DIAGONAL,
                          &PyTuple_Type, &parts, given + RHS, given + SOLUTION, given + FREE,
                          given + DOUBT))
        return NULL;
    const int count = (int)PyTuple_GET_SIZE(parts);
    Py_buffer *all = malloc(sizeof(Py_buffer) * (EACH * count + 1));
    if (!all) PyErr_NoMemory();
    else if (!take_parts(parts, all, &taken)) done = solve_arrays(&t, &of, given, all, count, threads);
    while (taken) PyBuffer_Release(all + --taken);
    for (int i = 0; i < BUFFERS; i++) PyBuffer_Release(given + i);
    free(all);
    if (!done) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"solve", solve, METH_VARARGS,
     "Solve a batch of linear systems; the arrays that come last are written to."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cone_systems", NULL, 0, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cone_systems(void) { return PyModule_Create(&module); }
