/* The compiled part of the package: small dense programs and linear systems, in batches.

   Everything of one element happens in memory of one thread; elements go to the threads of OpenMP,
   which are those of torch where both use the same library. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "layer.h"

/* Work on an element of a task, with memory that a thread keeps from element to element. */
typedef void (*Job)(Work *w, const void *task, int element, int *ready);

FOR_EVERY_CPU
static void solve_program(Work *w, const void *task, int element, int *ready)
{
    const Batch *batch = task;
    int64_t steps = 0;
    int outcome = NOT_CONVEX;
    if (!batch->shared || !*ready) *ready = 1 + take_matrices(w, batch, element);
    if (*ready == 2) outcome = solve_element(w, batch, element, &steps);
    if (outcome == INFEASIBLE)
        memcpy(batch->y + (int64_t)element * w->m, w->y, w->m * sizeof(double));
    batch->outcome[element] = outcome;
    batch->steps[element] = steps;
}

FOR_EVERY_CPU
static void solve_system(Work *w, const void *task, int element, int *ready)
{
    const Systems *systems = task;
    (void)ready;
    systems->failed[element] = (char)!solve_columns(w, systems, element);
}

FOR_EVERY_CPU
static void forward_pass(Work *w, const void *task, int element, int *ready)
{
    const Layer *layer = task;
    layer->failed[element] = (char)!solve_layer(w, layer, element, ready);
}

FOR_EVERY_CPU
static void backward_pass(Work *w, const void *task, int element, int *ready)
{
    const Layer *layer = task;
    layer->failed[element] = (char)!differentiate_layer(w, layer, element, ready);
}

/* Do a job on all elements, each thread with memory of its own: for n variables, m rows and so many
   numbers more; whether there was memory. */
static int solve_all(Job job, const void *task, int count, int threads, int n, int m,
                     int equalities, int64_t extra)
{
    int enough = 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        Work w;
        int ready = 0;
        if (!reserve(&w, n, m, equalities, extra)) enough = 0;
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (int element = 0; element < count; element++)
            if (w.memory) job(&w, task, element, &ready);
        free(w.memory);
    }
    (void)threads;
    return enough;
}

/* ---- Python ---------------------------------------------------------------------------------- */

enum { P_ROWS, P_COLS, A_ROWS, A_COLS, P, Q, A, B, START, X, Y, S, OUTCOME, STEPS, BUFFERS };

/* Whether a buffer has so many numbers of eight bytes, for one element or for each. */
static int fits(const Py_buffer *buffer, int64_t each, int64_t batch, int may_be_shared)
{
    const int64_t found = buffer->len / 8;
    return found == each * batch || (may_be_shared && found == each);
}

static int all_fit(const Batch *t, const Py_buffer *of)
{
    return fits(of + P, t->P_stored, t->batch, 1) && fits(of + A, t->A_stored, t->batch, 1)
        && fits(of + Q, t->n, t->batch, 0) && fits(of + B, t->m, t->batch, 0)
        && (!of[START].buf || fits(of + START, t->m, t->batch, 0))
        && fits(of + X, t->n, t->batch, 0) && fits(of + Y, t->m, t->batch, 0)
        && fits(of + S, t->m, t->batch, 0) && fits(of + OUTCOME, 1, t->batch, 0)
        && fits(of + STEPS, 1, t->batch, 0) && fits(of + P_COLS, t->P_stored, 1, 0)
        && fits(of + A_COLS, t->A_stored, 1, 0) && t->equalities <= t->m;
}

static void point_to(Batch *t, const Py_buffer *of)
{
    t->P_stored = of[P_ROWS].len / 8;
    t->A_stored = of[A_ROWS].len / 8;
    t->P_stride = of[P].len / 8 == t->P_stored ? 0 : t->P_stored;
    t->A_stride = of[A].len / 8 == t->A_stored ? 0 : t->A_stored;
    t->shared = !t->P_stride && !t->A_stride;
    t->P_rows = of[P_ROWS].buf, t->P_cols = of[P_COLS].buf;
    t->A_rows = of[A_ROWS].buf, t->A_cols = of[A_COLS].buf;
    t->P = of[P].buf, t->q = of[Q].buf, t->A = of[A].buf, t->b = of[B].buf;
    t->start = of[START].buf;
    t->x = of[X].buf, t->y = of[Y].buf, t->s = of[S].buf;
    t->outcome = of[OUTCOME].buf, t->steps = of[STEPS].buf;
}

static PyObject *solve_programs(PyObject *self, PyObject *args)
{
    Batch t;
    Py_buffer of[BUFFERS];
    int threads, done = 0;
    long long limit;
    (void)self;
    if (!PyArg_ParseTuple(args, "iiiidLdiy*y*y*y*y*y*y*y*z*w*w*w*w*w*", &t.batch, &t.n, &t.m,
                          &t.equalities, &t.tolerance, &limit, &t.seconds, &threads, of + P_ROWS,
                          of + P_COLS, of + A_ROWS, of + A_COLS, of + P, of + Q, of + A, of + B,
                          of + START, of + X, of + Y, of + S, of + OUTCOME, of + STEPS))
        return NULL;
    t.limit = limit;
    point_to(&t, of);
    if (!all_fit(&t, of)) {
        PyErr_SetString(PyExc_ValueError, "arrays of sizes that do not fit each other");
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = solve_all(solve_program, &t, t.batch, threads, t.n, t.m, t.equalities, 0);
        Py_END_ALLOW_THREADS
        if (!done) PyErr_NoMemory();
    }
    for (int i = 0; i < BUFFERS; i++)
        if (of[i].obj) PyBuffer_Release(of + i);
    if (!done) return NULL;
    Py_RETURN_NONE;
}

static PyObject *solve_systems(PyObject *self, PyObject *args)
{
    enum { P_MATRIX, A_MATRIX, DIAGONAL, RHS, SOLUTION, FAILED, ALL };
    Systems t;
    Py_buffer of[ALL];
    int threads, done = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "iiiipiy*y*y*y*w*w*", &t.batch, &t.n, &t.m, &t.columns,
                          &t.transpose, &threads, of + P_MATRIX, of + A_MATRIX, of + DIAGONAL,
                          of + RHS, of + SOLUTION, of + FAILED))
        return NULL;
    const int64_t n = t.n, m = t.m, size = (n + m) * t.columns;
    t.P = of[P_MATRIX].buf, t.A = of[A_MATRIX].buf, t.diagonal = of[DIAGONAL].buf;
    t.rhs = of[RHS].buf, t.solution = of[SOLUTION].buf, t.failed = of[FAILED].buf;
    t.P_stride = of[P_MATRIX].len / 8 == n * n ? 0 : n * n;
    t.A_stride = of[A_MATRIX].len / 8 == m * n ? 0 : m * n;
    if (!(fits(of + P_MATRIX, n * n, t.batch, 1) && fits(of + A_MATRIX, m * n, t.batch, 1)
          && fits(of + DIAGONAL, m, t.batch, 0) && fits(of + RHS, size, t.batch, 0)
          && fits(of + SOLUTION, size, t.batch, 0) && of[FAILED].len == t.batch)) {
        PyErr_SetString(PyExc_ValueError, "arrays of sizes that do not fit each other");
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = solve_all(solve_system, &t, t.batch, threads, t.n, t.m < t.n ? t.m : t.n, 0, 0);
        Py_END_ALLOW_THREADS
        if (!done) PyErr_NoMemory();
    }
    for (int i = 0; i < ALL; i++) PyBuffer_Release(of + i);
    if (!done) return NULL;
    Py_RETURN_NONE;
}

/* The arrays that describe a layer, in this order, and where `Layer` has them. */
enum { ROW_STARTS, SOURCE, FACTOR, CONSTANT, LINES, SECTIONS, WIDTHS, HEIGHTS, PLACE, PORTION,
       DESCRIPTION };

static void describe(Layer *t, const Py_buffer *of)
{
    t->start = of[ROW_STARTS].buf, t->source = of[SOURCE].buf;
    t->factor = of[FACTOR].buf, t->constant = of[CONSTANT].buf;
    t->lines = of[LINES].buf, t->sections = of[SECTIONS].buf;
    t->widths = of[WIDTHS].buf, t->heights = of[HEIGHTS].buf;
    t->place = of[PLACE].buf, t->share = of[PORTION].buf;
    t->inputs = (int)(of[WIDTHS].len / 8), t->outputs = (int)(of[HEIGHTS].len / 8);
    t->size = 0;
    for (int i = 0; i < t->inputs; i++) t->size += t->widths[i];
}

/* Addresses in a tuple, 0 for none; whether there are so many. */
static int read_addresses(PyObject *tuple, double **out, int count)
{
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count) {
        PyErr_SetString(PyExc_ValueError, "addresses are not as many as expected");
        return 0;
    }
    for (int i = 0; i < count; i++) out[i] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, i));
    return !PyErr_Occurred();
}

/* One pass over a batch. Returns how many elements failed, or -1. */
static long run_layers(Layer *t, Job job, int threads, PyObject *input, PyObject *output,
                       PyObject *gradient)
{
    const int count = 2 * t->inputs + t->outputs;
    long failures = -1;
    double **addresses = calloc(count + 1, sizeof(double *));
    t->failed = calloc(t->batch + 1, 1);
    t->input = addresses, t->gradient = addresses + t->inputs;
    t->output = addresses + 2 * t->inputs;
    if (!addresses || !t->failed) {
        PyErr_NoMemory();
    } else if (read_addresses(input, t->input, t->inputs)
               && read_addresses(output, t->output, t->outputs)
               && read_addresses(gradient, t->gradient, t->inputs)) {
        int done;
        Py_BEGIN_ALLOW_THREADS
        done = solve_all(job, t, t->batch, threads, t->n, t->m, t->equalities, carve(NULL, t, NULL));
        Py_END_ALLOW_THREADS
        if (!done) PyErr_NoMemory();
        else failures = 0;
        for (int i = 0; done && i < t->batch; i++) failures += t->failed[i];
    }
    free(addresses);
    free(t->failed);
    return failures;
}

static PyObject *pass(PyObject *args, Job job)
{
    Layer t;
    Py_buffer of[DESCRIPTION], x = {0}, y = {0}, stride = {0};
    PyObject *arrays, *input, *output, *gradient;
    int threads, got = 0;
    long long limit;
    long failures = -1;
    if (!PyArg_ParseTuple(args, "O!iiiidLiipO!O!O!y*w*w*", &PyTuple_Type, &arrays, &t.n, &t.m,
                          &t.count, &t.equalities, &t.tolerance, &limit, &t.batch, &threads,
                          &t.shared, &PyTuple_Type, &input, &PyTuple_Type, &output, &PyTuple_Type,
                          &gradient, &stride, &x, &y))
        return NULL;
    t.limit = limit;
    t.x = x.buf, t.y = y.buf, t.stride = stride.buf;
    for (; got < DESCRIPTION && got < PyTuple_GET_SIZE(arrays); got++)
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(arrays, got), of + got, PyBUF_SIMPLE)) break;
    if (got == DESCRIPTION) {
        describe(&t, of);
        if (fits(&x, t.n, t.batch, 0) && fits(&y, t.m, t.batch, 0) && fits(&stride, t.inputs, 1, 0))
            failures = run_layers(&t, job, threads, input, output, gradient);
        else
            PyErr_SetString(PyExc_ValueError, "arrays of sizes that do not fit each other");
    } else if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "a description lacks arrays");
    }
    while (got--) PyBuffer_Release(of + got);
    PyBuffer_Release(&x);
    PyBuffer_Release(&y);
    PyBuffer_Release(&stride);
    return failures < 0 ? NULL : PyLong_FromLong(failures);
}

static PyObject *solve_layers(PyObject *self, PyObject *args)
{
    (void)self;
    return pass(args, forward_pass);
}

static PyObject *differentiate_layers(PyObject *self, PyObject *args)
{
    (void)self;
    return pass(args, backward_pass);
}

static PyMethodDef methods[] = {
    {"solve_programs", solve_programs, METH_VARARGS,
     "Solve a batch of programs; the arrays that come last are written to."},
    {"solve_systems", solve_systems, METH_VARARGS,
     "Solve a batch of linear systems; the arrays that come last are written to."},
    {"solve_layers", solve_layers, METH_VARARGS,
     "From parameters to outputs, at addresses; returns how many elements were not settled."},
    {"differentiate_layers", differentiate_layers, METH_VARARGS,
     "From gradients of outputs to those of parameters; returns how many were not settled."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_programs", NULL, 0, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__programs(void) { return PyModule_Create(&module); }
