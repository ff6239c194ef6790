// The C++ library, which every kernel's compilation would parse anew: it is precompiled once.
#ifndef STANDARD_H
#define STANDARD_H
#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>
#endif
