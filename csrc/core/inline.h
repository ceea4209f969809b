// Inlining by force, for what takes a body: out of line, the body's captures would be read from memory in every step.
#pragma once

#define ACF_INLINE __attribute__((always_inline)) inline
